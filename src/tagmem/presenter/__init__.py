"""Ways for a hypervisor to present tagged memory to a guest, behind one contract."""

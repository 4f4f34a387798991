#!/usr/bin/busybox sh
# The first process of a lab guest: file systems, the modules that the kernel's command line asks
# for (tagmem.modules=a,b), then the guest agent, again and again. There is no udev: what the
# devices of a lab guest need is loaded before they come.
export PATH=/usr/bin:/usr/sbin HOME=/root LANG=C.UTF-8
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mkdir -p /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
mount -t devpts pts /dev/pts
mount -t debugfs debug /sys/kernel/debug 2>/dev/null
exec </dev/null >/dev/console 2>&1
read -r up rest </proc/uptime
echo "tagmem-init: Linux $(uname -r) after $up s"
ip link set lo up
agent=1
for word in $(cat /proc/cmdline); do
    case $word in
        tagmem.modules=*) modprobe -a $(echo "${word#*=}" | tr , ' ') ;;
        tagmem.agent=off) agent=0 ;;
    esac
done
# QEMU's user network has one shape; a guest without a card stays alone.
for card in /sys/class/net/e*; do
    [ -e "$card" ] || continue
    ip addr add 10.0.2.15/24 dev "${card##*/}"
    ip link set "${card##*/}" up
    ip route add default via 10.0.2.2
done
read -r up rest </proc/uptime
echo "tagmem-init: modules after $up s"
# Names for virtio-serial ports are udev's work elsewhere; a port may come a moment later.
mkdir -p /dev/virtio-ports
name_ports() {
    for port in /sys/class/virtio-ports/*; do
        read -r name 2>/dev/null <"$port/name" && [ -n "$name" ] || continue
        ln -sf "../${port##*/}" "/dev/virtio-ports/$name"
    done
}
name_ports
[ -n "$(ls /dev/virtio-ports)" ] || (for n in 1 2 3 4 5 6 7 8 9; do sleep 0.3; name_ports; done) &
cd /root
while [ "$agent" = 1 ]; do
    python3 -m tagmem.guest
    echo "tagmem-init: the agent ended with $?"
    sleep 1
done
exec sleep 2147483647

"""The lab: guests and QEMUs made from Debian packages, unpacked into a cache folder and run there.

Nothing of it is installed on the machine, so that a clone on a bare Debian can boot the guests that
its tests need, and two versions of QEMU live side by side.
"""

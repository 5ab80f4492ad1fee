#!/bin/sh
# A service of the installed Debian: a nested guest by QEMU and KVM, then the end of the machine.
exec > /dev/ttyS0 2>&1
modprobe kvm_intel
echo "debian: $(uname -sr), $(systemctl --version | head -n 1), root on $(findmnt -no SOURCE /)"
qemu-system-x86_64 -accel kvm -cpu host -smp 2 -m 256 -nodefaults -display none -serial stdio -no-reboot \
    -kernel /vmlinuz -initrd /nested-initrd -append "console=ttyS0 panic=-1 reboot=t mitigations=off quiet" < /dev/null
echo "L1HV-RESULT {\"kind\":\"exit\",\"status\":$?}"
sync
case $(cat /proc/cmdline) in
    *l1hv.end=reset*) reboot -ff ;;
    *) poweroff ;;
esac

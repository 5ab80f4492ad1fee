#!/bin/sh
# Init of the Linux that runs QEMU with KVM inside Bochs. The machine under test is QEMU's: its console is ttyS0 here, its debug port ttyS1.
#   /qemu        starts QEMU
#   /events.ask  what QEMU reads on its control socket
#   /parameters  of kvm-intel
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /tmp /dev/shm
for module in /modules/*.ko; do
    case $module in
        *kvm-intel.ko) insmod "$module" nested=1 $(cat /parameters) || echo "L1HV-OUTER: kvm-intel takes no $(cat /parameters)" ;;
        *) insmod "$module" ;;
    esac
done
# Bytes pass as they are.
stty raw -echo 115200 < /dev/ttyS0
stty raw -echo 115200 < /dev/ttyS1

sh /qemu < /events.ask > /tmp/events 2> /tmp/errors &
qemu=$!
while kill -0 $qemu 2> /dev/null; do
    # A virtual machine that KVM cannot go on with is only paused.
    if grep -q -e 'internal error' -e 'entry failed' /tmp/errors; then
        kill $qemu
        break
    fi
    sleep 0.2
done
wait $qemu
status=$?
cat /tmp/events /tmp/errors
echo "L1HV-OUTER: QEMU's status $status"
poweroff -f

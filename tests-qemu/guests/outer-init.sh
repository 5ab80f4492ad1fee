#!/bin/sh
# Init of the Linux that runs QEMU with KVM inside Bochs. QEMU's machine is the one under test: here its console is
# ttyS0 and its debug port ttyS1.
#   /runs/*/qemu        starts a QEMU; one after the other
#   /runs/*/parameters  of kvm-intel
#   /runs/*/limit       on the run, in steps of 0.2 emulated seconds; without it there is none
#   /events.ask         what QEMU reads on its control socket
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /tmp /dev/shm
# A machine may have more memory than there is: it does not touch all of it.
echo 1 > /proc/sys/vm/overcommit_memory
# Bytes pass unchanged.
stty raw -echo 115200 < /dev/ttyS0
stty raw -echo 115200 < /dev/ttyS1

loaded=none
load_kvm() {
    [ "$loaded" != "$*" ] || return
    [ "$loaded" = none ] || rmmod kvm_intel
    for module in /modules/*.ko; do
        case $module in
            *kvm-intel.ko) insmod "$module" nested=1 "$@" || echo "L1HV-OUTER: kvm-intel takes no $*" ;;
            *) [ "$loaded" != none ] || insmod "$module" ;;
        esac
    done
    loaded=$*
}

run_qemu() {
    : > /tmp/errors
    sh $1/qemu < /events.ask > /tmp/events 2> /tmp/errors &
    qemu=$!
    left=$(cat $1/limit 2> /dev/null)
    while kill -0 $qemu 2> /dev/null; do
        # QEMU only pauses a virtual machine that KVM cannot continue.
        if grep -q -e 'internal error' -e 'entry failed' /tmp/errors; then
            kill $qemu
        elif [ "$left" = 0 ]; then
            echo "L1HV-OUTER: the limit is reached"
            kill -9 $qemu
        fi
        sleep 0.2
        [ -z "$left" ] || left=$((left - 1))
    done
    wait $qemu
    status=$?
    cat /tmp/events /tmp/errors
    echo "L1HV-OUTER: QEMU's status $status"
}

for run in /runs/*; do
    if [ -d /runs/001 ]; then
        for tty in /dev/ttyS0 /dev/ttyS1 /dev/console; do
            echo "L1HV-OUTER: run ${run##*/}" > $tty
        done
    fi
    load_kvm $(cat $run/parameters)
    run_qemu $run
done
poweroff -f

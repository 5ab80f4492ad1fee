#!/bin/sh
# Init of the guest hypervisor. The kernel command line says what to do:
#   l1hv.ept=0|1   the ept parameter of kvm-intel; without it KVM's own default
#   l1hv.kvm=P=V   any other parameter of kvm-intel; repeatable
#   l1hv.run=WORK  boot-only, payload, linux, demo (payload and linux), minimal (the minimal guest
#                  hypervisor), nest (a guest hypervisor with this init and the demo as its work), nest-payload,
#                  hotplug (processors come and go while a nested Linux runs), clocks (both levels are busy),
#                  or reboot (by the means that the kernel's own reboot= names; the second boot ends the machine)
#   l1hv.end=reset resets the machine at the end, where there is no power to switch off
#   l1hv.counted   the payload does all once more, for an emulator that counts
#   l1hv.show=NAME shows the payload's results on screen and serial port, as those of the system NAME
#   l1hv.linger=N  stays so long, in seconds, before the end
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t debugfs debug /sys/kernel/debug
vmm mark init
echo "init: $(grep -c ^processor /proc/cpuinfo) cpu, $(grep MemTotal: /proc/meminfo)"

work=boot-only
end=power-off
show=
linger=0
counted=
kvm_parameters=
nested_arguments=
for word in $(cat /proc/cmdline); do
    case $word in
        l1hv.run=*) work=${word#*=} ;;
        l1hv.end=*) end=${word#*=} ;;
        l1hv.counted) counted=counted ;;
        l1hv.show=*) show=${word#*=} ;;
        l1hv.linger=*) linger=${word#*=} ;;
        l1hv.ept=*) kvm_parameters="$kvm_parameters ept=${word#*=}" ;;
        l1hv.kvm=*) kvm_parameters="$kvm_parameters ${word#*=}" ;;
        tsc_early_khz=*) nested_arguments=$word ;;
    esac
done

# One level up, a guest hypervisor is a nested guest too.
[ $end != reset ] || echo "L1HV-NESTED-INIT $(uname -sr)"

start_kvm() {
    for module in /modules/*.ko; do
        case $module in
            *kvm-intel.ko) insmod "$module" $kvm_parameters || return 1 ;;
            *) insmod "$module" || return 1 ;;
        esac
    done
    for parameter in ept enable_apicv enable_shadow_vmcs; do
        echo "kvm-intel: $parameter=$(cat /sys/module/kvm_intel/parameters/$parameter)"
    done
    vmm mark kvm-loaded
}

run_payload() {
    # The payload counts first touches of small pages.
    echo never > /sys/kernel/mm/transparent_hugepage/enabled
    vmm payload /payload $counted
}

run_linux() {
    echo always > /sys/kernel/mm/transparent_hugepage/enabled
    vmm linux "$(cat /nested/memory)" "$(cat /nested/cpus)" /nested/bzImage /nested/initrd $(cat /nested/arguments) $nested_arguments
}

# Runs the parallel workload, if the nested guest has several processors too.
run_parallel() {
    [ ! -x /bin/parallel ] || parallel "$(cat /times)"
}

# Takes all processors but the first offline and online again while the nested guest runs.
run_hotplug() {
    run_linux &
    nested=$!
    changes=0
    while kill -0 $nested 2> /dev/null; do
        for online in /sys/devices/system/cpu/cpu[1-9]*/online; do
            echo 0 > $online && echo 1 > $online && changes=$((changes + 2))
        done
    done
    echo "hotplug: $changes changes"
    wait $nested && run_parallel
}

# Loads both levels at once, from shortly before the nested init on.
run_loaded() {
    run_linux &
    nested=$!
    sleep 1
    while kill -0 $nested 2> /dev/null; do
        run_parallel || return 1
    done
    wait $nested
}

run_reboot() {
    boots=$(vmm boots) || return 1
    if [ "$boots" != 0 ]; then
        echo "reboot: the machine has come back"
        return 0
    fi
    start_kvm || return 1
    run_linux &
    sleep 1
    echo "reboot: now"
    echo b > /proc/sysrq-trigger
    sleep 10
    return 1
}

do_work() {
    case $work in
        boot-only) ;;
        payload) start_kvm && run_payload ;;
        linux | nest | nest-payload) start_kvm && run_parallel && run_linux ;;
        demo) start_kvm && run_payload && run_parallel && run_linux ;;
        hotplug) start_kvm && run_hotplug ;;
        clocks) start_kvm && run_loaded ;;
        reboot) run_reboot ;;
        minimal) start_kvm && vmm multiboot /minimal minimal ;;
        *) echo "init: l1hv.run=$work is none of boot-only, payload, linux, demo, nest, nest-payload, hotplug, clocks, reboot, minimal" ;;
    esac
}

# Writes to the screen and to the serial port.
on_consoles() {
    for console in /dev/ttyS0 /dev/tty0; do
        { "$@" > $console; } 2> /dev/null
    done
}

show_results() {
    if [ $status = 0 ]; then
        vmm timings json $show /results
        on_consoles vmm timings table $show /results
    else
        on_consoles echo "$show: the work failed; what it said last:"
        on_consoles tail -n 20 /results
    fi
    sleep $linger
}

if [ -n "$show" ]; then
    on_consoles echo "$show: nested exits are being timed"
    { do_work; echo $? > /status; } 2>&1 | tee /results
    status=$(cat /status)
    show_results
else
    do_work
    status=$?
fi
vmm stats
echo "L1HV-RESULT {\"kind\":\"exit\",\"status\":$status}"
case $end in
    reset) reboot -f ;;
    *) poweroff -f ;;
esac

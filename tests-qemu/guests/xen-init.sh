#!/bin/sh
# Init of Xen's first domain: starts Xen's daemons, makes a guest of each configuration in /guests, waits until it is
# gone, prints its console, and switches the machine off.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /run/xen /run/lock /var/lib/xen /var/lib/xenstored /var/log/xen
mount -t devpts pts /dev/pts
ln -s /run /var/run
ln -s /run/lock /var/lock
for module in /modules/*.ko; do
    insmod "$module"
done
mount -t xenfs xen /proc/xen
bin=/usr/lib/xen-4.17/bin
echo "init: $(uname -sr) as Xen's first domain"
$bin/xenstored --pid-file /run/xen/xenstored.pid
$bin/xen-init-dom0
$bin/xenconsoled --log=guest --log-dir=/var/log/xen
$bin/xl info | grep -e xen_version -e virt_caps
status=0
for guest in /guests/*.cfg; do
    name=${guest##*/}
    name=${name%.cfg}
    if $bin/xl create "$guest"; then
        echo "xen: $name runs"
        while $bin/xl list "$name" > /dev/null 2>&1; do
            sleep 0.5
        done
    else
        status=1
        cat /var/log/xen/qemu-dm-$name.log
    fi
    cat /var/log/xen/guest-$name.log
    echo "xen: $name is gone"
done
echo "L1HV-RESULT {\"kind\":\"exit\",\"status\":$status}"
poweroff -f

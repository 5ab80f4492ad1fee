// Real-mode code that stays in the guest's low memory, below 1 MiB: the services of interrupt 15H that tell of memory,
// with the host's region left out, and the start of a disk. `boot::bios` has the layout of the data behind it.
//
// Offsets count from the first byte, where CS points.

.set SMAP, 0x534d4150
.set E820_ENTRY, 20
.set UNSUPPORTED, 0x86
.set CARRY, 1
.set BOOT_SECTOR, 0x7c00
.set SIGNATURE, 0xaa55

.set BIOS_INT15, bios_services_data - bios_services_start
.set BIOS_COUNT, BIOS_INT15 + 4
.set BIOS_LOW, BIOS_INT15 + 8           // KiB from 1 MiB to 16 MiB
.set BIOS_HIGH, BIOS_INT15 + 10         // 64-KiB blocks from 16 MiB
.set BIOS_EXTENDED, BIOS_INT15 + 12     // KiB from 1 MiB, in 16 bits
.set BIOS_DRIVE, BIOS_INT15 + 14
.set BIOS_MAP, BIOS_INT15 + 16

.section .rodata.bios_services, "a"
.balign 16
.code16
.global bios_services_start
bios_services_start:
    jmp int15
.balign 4
    jmp start_disk
.balign 4
no_boot_sector:
    vmcall                              // the host stops the machine
1:  hlt
    jmp 1b

int15:
    cmpw $0xe820, %ax
    je system_map
    cmpw $0xe801, %ax
    je sizes
    cmpb $0x88, %ah
    je extended_size
    cmpw $0xe881, %ax                   // older ways to ask for the same
    je unsupported
    cmpw $0xda88, %ax
    je unsupported
    cmpb $0x8a, %ah
    je unsupported
    cmpb $0xc7, %ah
    je unsupported
pass_on:
    ljmpw *%cs:BIOS_INT15

system_map:
    cmpl $SMAP, %edx
    jne pass_on
    cmpl %cs:BIOS_COUNT, %ebx
    jae unsupported
    cmpl $E820_ENTRY, %ecx
    jb unsupported
    pushw %si
    pushw %di
    imulw $E820_ENTRY, %bx, %si
    addw $BIOS_MAP, %si
    movl $E820_ENTRY, %ecx
    cld
1:  movb %cs:(%si), %al
    stosb
    incw %si
    loop 1b
    popw %di
    popw %si
    movl $E820_ENTRY, %ecx
    movl $SMAP, %eax
    incl %ebx
    cmpl %cs:BIOS_COUNT, %ebx
    jb success
    xorl %ebx, %ebx                     // that was the last one
    jmp success

sizes:
    movw %cs:BIOS_LOW, %ax
    movw %cs:BIOS_HIGH, %bx
    movw %ax, %cx
    movw %bx, %dx
    jmp success

extended_size:
    movw %cs:BIOS_EXTENDED, %ax
success:
    pushw %bp
    movw %sp, %bp
    andw $~CARRY, 6(%bp)                // in the caller's flags
    popw %bp
    iretw

unsupported:
    movb $UNSUPPORTED, %ah
    pushw %bp
    movw %sp, %bp
    orw $CARRY, 6(%bp)
    popw %bp
    iretw

// Begins as the BIOS begins its first boot device.
start_disk:
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $BOOT_SECTOR, %sp
    sti
    cld
    movb %cs:BIOS_DRIVE, %dl
    int $0x13                           // AH 0: reset
    movw $0x0201, %ax                   // read one sector
    movw $BOOT_SECTOR, %bx
    movw $0x0001, %cx                   // cylinder 0, sector 1
    movb %cs:BIOS_DRIVE, %dl
    movb $0, %dh                        // head 0
    int $0x13
    jc no_boot_sector
    cmpw $SIGNATURE, BOOT_SECTOR + 510
    jne no_boot_sector
    movb %cs:BIOS_DRIVE, %dl
    movb $0, %dh
    ljmpw $0, $BOOT_SECTOR

.balign 4
.global bios_services_data
bios_services_data:

.text
.code64

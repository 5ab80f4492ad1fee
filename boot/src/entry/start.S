// From a multiboot loader (32-bit protected mode, flat, paging off) to long mode and `l1hv_main(magic, info)`.
//
// Everything is linked at VIRTUAL_BASE + its physical address, so code that runs before paging subtracts VIRTUAL_BASE
// from each symbol.

.set VIRTUAL_BASE, 0xFFFFFFFF80000000

.set MULTIBOOT_MAGIC, 0x1BADB002
// Page-aligned modules, memory information, and the address fields below. `qemu -kernel` loads a 64-bit ELF only by the
// address fields.
.set MULTIBOOT_FLAGS, (1 << 0) | (1 << 1) | (1 << 16)

// The same for multiboot 2, which GRUB needs on EFI firmware.
.set MULTIBOOT2_MAGIC, 0xE85250D6
.set MULTIBOOT2_I386, 0
.set TAG_END, 0
.set TAG_ADDRESS, 2
.set TAG_ENTRY, 3
.set TAG_FRAMEBUFFER, 5
.set TAG_MODULE_ALIGN, 6
.set TAG_OPTIONAL, 1

.set CR0_PE, 1 << 0
.set CR0_MP, 1 << 1
.set CR0_NE, 1 << 5
.set CR0_WP, 1 << 16
.set CR0_PG, 1 << 31
.set CR4_PAE, 1 << 5
.set IA32_EFER, 0xC0000080
.set EFER_LME, 1 << 8
.set EFER_NXE, 1 << 11
.set EFLAGS_ID, 1 << 21

.set PTE_TABLE, 0x03        // present, writable
.set PTE_2MIB, 0x83         // present, writable, large

.section .multiboot, "a"
.balign 4
multiboot_header:
    .long MULTIBOOT_MAGIC
    .long MULTIBOOT_FLAGS
    .long -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)
    .long multiboot_header - VIRTUAL_BASE
    .long __image_start - VIRTUAL_BASE
    .long __image_file_end - VIRTUAL_BASE
    .long __image_end - VIRTUAL_BASE
    .long _start - VIRTUAL_BASE

.balign 8
multiboot2_header:
    .long MULTIBOOT2_MAGIC
    .long MULTIBOOT2_I386
    .long multiboot2_end - multiboot2_header
    .long -(MULTIBOOT2_MAGIC + MULTIBOOT2_I386 + (multiboot2_end - multiboot2_header))
.balign 8
    .short TAG_ADDRESS, 0
    .long 24
    .long multiboot2_header - VIRTUAL_BASE
    .long __image_start - VIRTUAL_BASE
    .long __image_file_end - VIRTUAL_BASE
    .long __image_end - VIRTUAL_BASE
.balign 8
    .short TAG_ENTRY, 0
    .long 12
    .long _start - VIRTUAL_BASE
.balign 8
    .short TAG_FRAMEBUFFER, TAG_OPTIONAL
    .long 20
    .long 0, 0, 0                       // any width, height and depth
.balign 8
    .short TAG_MODULE_ALIGN, 0
    .long 8
.balign 8
    .short TAG_END, 0
    .long 8
multiboot2_end:

.section .boot.text, "ax"
.code32
.global _start
_start:
    cli
    cld
    movl $(__boot_stack_top - VIRTUAL_BASE), %esp
    movl %eax, %edi                     // magic, first argument of l1hv_main
    movl %ebx, %esi                     // multiboot information, second argument

    // A processor without CPUID cannot toggle EFLAGS.ID.
    pushfl
    popl %eax
    movl %eax, %ecx
    xorl $EFLAGS_ID, %eax
    pushl %eax
    popfl
    pushfl
    popl %eax
    xorl %ecx, %eax
    testl $EFLAGS_ID, %eax
    jz no_long_mode

    movl $0x80000000, %eax
    cpuid
    cmpl $0x80000001, %eax
    jb no_long_mode
    movl $0x80000001, %eax
    cpuid
    testl $(1 << 29), %edx              // CPUID.80000001H:EDX[29]: Intel 64
    jz no_long_mode
    movl %edx, %ebp                     // kept for the execute-disable bit

    // Four page directories of 2 MiB pages map the low 4 GiB. The identity map, the direct map and the image share them.
    movl $(early_pd - VIRTUAL_BASE), %ebx
    xorl %ecx, %ecx
1:  movl %ecx, %eax
    shll $21, %eax
    orl $PTE_2MIB, %eax
    movl %eax, (%ebx, %ecx, 8)
    movl $0, 4(%ebx, %ecx, 8)
    incl %ecx
    cmpl $2048, %ecx
    jne 1b

    movl $(early_pdpt_low - VIRTUAL_BASE), %eax
    movl $(early_pd - VIRTUAL_BASE + PTE_TABLE), (%eax)
    movl $(early_pd - VIRTUAL_BASE + 0x1000 + PTE_TABLE), 8(%eax)
    movl $(early_pd - VIRTUAL_BASE + 0x2000 + PTE_TABLE), 16(%eax)
    movl $(early_pd - VIRTUAL_BASE + 0x3000 + PTE_TABLE), 24(%eax)
    movl $(early_pdpt_image - VIRTUAL_BASE), %eax
    movl $(early_pd - VIRTUAL_BASE + PTE_TABLE), 510*8(%eax)
    movl $(early_pml4 - VIRTUAL_BASE), %eax
    movl $(early_pdpt_low - VIRTUAL_BASE + PTE_TABLE), (%eax)
    movl $(early_pdpt_low - VIRTUAL_BASE + PTE_TABLE), 256*8(%eax)
    movl $(early_pdpt_image - VIRTUAL_BASE + PTE_TABLE), 511*8(%eax)
    movl %eax, %cr3

    movl $CR4_PAE, %eax
    movl %eax, %cr4
    movl $IA32_EFER, %ecx
    rdmsr
    orl $EFER_LME, %eax
    testl $(1 << 20), %ebp              // CPUID.80000001H:EDX[20]: execute disable
    jz 2f
    orl $EFER_NXE, %eax
2:  wrmsr
    movl $(CR0_PE | CR0_MP | CR0_NE | CR0_WP | CR0_PG), %eax
    movl %eax, %cr0
    lgdt early_gdt_pointer - VIRTUAL_BASE
    ljmpl $0x08, $(long_mode - VIRTUAL_BASE)

// No 64-bit mode: report it on the log device, end the machine, halt. The line has the form of `protocol::stop`.
no_long_mode:
    movl $(no_long_mode_text - VIRTUAL_BASE), %esi
    movw ${debug_port}, %dx
    inb %dx, %al
    cmpb ${debug_port}, %al                     // an emulator's debug console reads back its own port number
    je 3f
    movw $0x3f8, %dx                    // else COM1
3:  movb (%esi), %bl
    incl %esi
    testb %bl, %bl
    jz 6f
    cmpw ${debug_port}, %dx
    je 5f
    movl $100000, %ecx                  // the wait for an absent UART must end
4:  movw $0x3fd, %dx
    inb %dx, %al
    testb $0x20, %al                    // transmitter holding register empty
    loopz 4b
    movw $0x3f8, %dx
5:  movb %bl, %al
    outb %al, %dx
    jmp 3b
6:  movl $({shutdown_text} - VIRTUAL_BASE), %esi
    movl ${shutdown_length}, %ecx
    movw ${shutdown_port}, %dx
    rep outsb
    movl ${no_long_mode_status}, %eax
    movw ${exit_port}, %dx
    outl %eax, %dx
7:  hlt
    jmp 7b

no_long_mode_text:
    .ascii "l1hv: stop: no-long-mode: this processor has no 64-bit mode: use an Intel 64 processor with VMX\n\0"

.code64
long_mode:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    xorl %eax, %eax
    movw %ax, %fs
    movw %ax, %gs
    movq $__boot_stack_top, %rsp
    xorl %ebp, %ebp                     // the end of any backtrace
    movq $l1hv_main, %rax
    callq *%rax                         // leaves the identity map for good
    ud2

.balign 8
early_gdt:
    .quad 0
    .quad 0x00AF9A000000FFFF            // 0x08: 64-bit code
    .quad 0x00CF92000000FFFF            // 0x10: data
early_gdt_pointer:
    .word . - early_gdt - 1
    .long early_gdt - VIRTUAL_BASE

.section .bss.early_tables, "aw", @nobits
.balign 4096
early_pml4:
    .skip 4096
early_pdpt_low:
    .skip 4096
early_pdpt_image:
    .skip 4096
early_pd:
    .skip 4 * 4096

.text

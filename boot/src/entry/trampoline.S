// From the real mode in which a SIPI starts a processor, at the beginning of a page below 1 MiB, to 64-bit code of the
// image.
//
// The code is copied to that page, followed by its parameters. One write to CR0 enables paging, with tables that map
// the page to itself, and enters long mode.

.section .rodata.trampoline, "a"
.balign 16
.code16
.global trampoline_start
trampoline_start:
    cli
    cld
    movw %cs, %bx
    movw %bx, %ds
    movzwl %bx, %ebx
    shll $4, %ebx                       // the page's address
    // Two addresses depend on the page: that of the GDT, and that of the 64-bit code.
    leal (trampoline_gdt - trampoline_start)(%ebx), %eax
    movl %eax, trampoline_gdt_base - trampoline_start
    leal (trampoline_long - trampoline_start)(%ebx), %eax
    movl %eax, trampoline_far - trampoline_start
    lgdtl trampoline_gdt_pointer - trampoline_start

    movl trampoline_cr4 - trampoline_start, %eax
    movl %eax, %cr4
    movl trampoline_cr3 - trampoline_start, %eax
    movl %eax, %cr3
    movl $0xC0000080, %ecx              // IA32_EFER
    movl trampoline_efer - trampoline_start, %eax
    xorl %edx, %edx
    wrmsr
    movl trampoline_cr0 - trampoline_start, %eax
    movl %eax, %cr0
    ljmpl *(trampoline_far - trampoline_start)

.code64
trampoline_long:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    xorl %eax, %eax
    movw %ax, %fs
    movw %ax, %gs
    movl %ebx, %ebx
    movq (trampoline_stack - trampoline_start)(%rbx), %rsp
    movq (trampoline_entry - trampoline_start)(%rbx), %rax
    xorl %ebp, %ebp                     // the end of any backtrace
    callq *%rax                         // leaves the page for good
    ud2

.balign 8
trampoline_gdt:
    .quad 0
    .quad 0x00AF9A000000FFFF            // 0x08: 64-bit code
    .quad 0x00CF92000000FFFF            // 0x10: data
trampoline_gdt_pointer:
    .word . - trampoline_gdt - 1
trampoline_gdt_base:
    .long 0
trampoline_far:
    .long 0
    .word 0x08

.balign 8
.global trampoline_parameters
trampoline_parameters:                  // `entry::TrampolineParameters`
trampoline_stack:
    .quad 0
trampoline_entry:
    .quad 0
trampoline_cr0:
    .long 0
trampoline_cr3:
    .long 0
trampoline_cr4:
    .long 0
trampoline_efer:
    .long 0
.global trampoline_end
trampoline_end:

.text

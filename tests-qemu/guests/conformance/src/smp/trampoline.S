# Where a processor begins after a SIPI: in real mode, in the page that the vector names. The page is copied there (start.rs); what it needs to
# know follows the code.

    .section .text.trampoline, "ax"
    .balign 16
    .code16
    .global trampoline
    .global trampoline_end
    .global trampoline_cr3
trampoline:
    cli
    movw %cs, %ax
    movw %ax, %ds
    lgdtl trampoline_gdt_pointer - trampoline
    movl $0x20, %eax                # PAE
    movl %eax, %cr4
    movl trampoline_cr3 - trampoline, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x900, %eax                # LME, NXE
    wrmsr
    movl $0x80010033, %eax          # PG, WP, NE, ET, MP, PE: from real mode to long mode at once
    movl %eax, %cr0
    ljmpl $0x08, $processor_start
trampoline_gdt_pointer:
    .word 0x5f
    .long gdt
trampoline_cr3:
    .long 0
trampoline_end:

    .code64
processor_start:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    xorl %eax, %eax
    movw %ax, %fs
    movw %ax, %gs
    movq $boot_stack_top, %rsp
    call processor_main
1:  hlt
    jmp 1b

# Where a processor begins after a SIPI: in real mode, in the page that the vector names. The page is copied there (start.rs); what it needs to
# know follows the code.

    .section .text.trampoline, "ax"
    .balign 16
    .code16
    .global trampoline
    .global trampoline_end
    .global trampoline_cr3
    .global trampoline_fault
trampoline:
    cli
    movw %cs, %ax
    movw %ax, %ds
    movw %ax, %ss
    movw $0x1000, %sp               # the end of the page
# WRMSR of a capability MSR faults. In real mode a fault pushes no error code: what it pushed, and where it came.
    xorw %bx, %bx
    movw %bx, %es
    pushl %es:0x34
    movw %sp, %bp
    movw $faulted - trampoline, %es:0x34
    movw %ax, %es:0x36
    movl $0x480, %ecx
faulting:
    wrmsr
    jmp recovered
faulted:
    popw %dx
    subw $faulting - trampoline, %dx
    addw $4, %sp                    # CS and FLAGS
    movw %bp, %cx
    subw %sp, %cx
    movw %dx, trampoline_fault - trampoline
    movw %cx, trampoline_fault - trampoline + 2
recovered:
    movw %bp, %sp
    popl %es:0x34
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
trampoline_fault:                   # how far behind the instruction, how many bytes too many on the stack
    .word 0xffff, 0xffff
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

# A processor begins here after a SIPI: in real mode, in the page that the vector names. start.rs copies the code there;
# its parameters follow the code.

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
# WRMSR of a capability MSR faults. In real mode a fault pushes no error code: records the pushed bytes and the place of
# the fault.
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
# Entering IA-32e mode faults with a 16-bit TSS in TR. The same MOV sets CR0.NE, so that it exits to a hypervisor.
    lgdtl small_gdt_pointer - trampoline
    lidtl small_idt_pointer - trampoline
    movl $0x11, %eax                # ET, PE
    movl %eax, %cr0
    ljmpw $0x08, $protected - trampoline
protected:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %ss
    movw $0x18, %ax
    ltr %ax
    movl $0x20, %eax                # PAE
    movl %eax, %cr4
    movl trampoline_cr3 - trampoline, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x900, %eax                # LME, NXE
    wrmsr
    movl $0x80000031, %eax          # PG, NE, ET, PE
entering:
    movl %eax, %cr0
    jmp refused
refusal:
    popw %cx                        # the error code
    popw %dx
    addw $4, %sp
    subw $entering - trampoline, %dx
    movl %cr0, %eax
    movw %dx, trampoline_fault - trampoline + 4
    movw %cx, trampoline_fault - trampoline + 6
    movl %eax, trampoline_fault - trampoline + 8
refused:
    movw $0x20, %ax
    ltr %ax
    lgdtl trampoline_gdt_pointer - trampoline
    movl $0x20, %eax                # PAE
    movl %eax, %cr4
    movl trampoline_cr3 - trampoline, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x900, %eax                # LME, NXE
    wrmsr
    movl $0x80010033, %eax          # PG, WP, NE, ET, MP, PE: to long mode at once
    movl %eax, %cr0
    ljmpl $0x08, $processor_start
trampoline_gdt_pointer:
    .word 0x5f
    .long gdt
trampoline_cr3:
    .long 0
trampoline_fault:
    .word 0xffff, 0xffff            # in real mode: how far behind the instruction, how many bytes too many on the stack
    .word 0xffff, 0xffff            # with a 16-bit TSS: how far behind the instruction, the error code
    .long 0xffffffff                # CR0 after that
    .balign 8
small_gdt:
    .quad 0
    .quad 0x00009b008000ffff        # 0x08: 16-bit code in this page
    .quad 0x000093008000ffff        # 0x10: data in this page
    .quad 0x000081000000002b        # 0x18: a 16-bit TSS
    .quad 0x0000890000000067        # 0x20: a 32-bit TSS
small_gdt_pointer:
    .word 0x27
    .long 0x8000 + small_gdt - trampoline
    .balign 8
small_idt:
    .skip 13 * 8
    .word refusal - trampoline, 0x08, 0x8600, 0
small_idt_pointer:
    .word 14 * 8 - 1
    .long 0x8000 + small_idt - trampoline
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

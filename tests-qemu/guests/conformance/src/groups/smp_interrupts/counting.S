# Handlers of a nested guest that counts its interrupts: RBP is its row of counters, RDI where each handler goes on.

    .section .text.counting, "ax"
    .balign 16
    .global counting_handlers
counting_handlers:
    .altmacro
    .macro counting number
    .balign 16
    incq 8 * \number(%rbp)
    jmp *%rdi
    .endm
    .set number, 0
    .rept 256
    counting %number
    .set number, number + 1
    .endr
    .noaltmacro

# Nothing to end: injected by the hypervisor, or an NMI.
    .global end_injected
end_injected:
    iretq

# The machine's local APIC has it in service.
    .global end_delivered
end_delivered:
    pushq %rax
    movl $0xfee000b0, %eax
    movl $0, (%rax)
    popq %rax
    iretq

# The virtual APIC, in x2APIC mode, has it in service.
    .global end_virtual
end_virtual:
    pushq %rax
    pushq %rcx
    pushq %rdx
    movl $0x80b, %ecx
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    popq %rdx
    popq %rcx
    popq %rax
    iretq

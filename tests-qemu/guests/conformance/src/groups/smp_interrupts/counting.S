# Handlers of a nested guest that counts its interrupts: RBP points to its row of counters, RDI to the code after the
# counting.

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

# An interrupt that the hypervisor injected, or an NMI: no EOI is needed.
    .global end_injected
end_injected:
    iretq

# An interrupt that is in service in the machine's local APIC.
    .global end_delivered
end_delivered:
    pushq %rax
    movl $0xfee000b0, %eax
    movl $0, (%rax)
    popq %rax
    iretq

# An interrupt that is in service in the virtual APIC, in x2APIC mode.
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

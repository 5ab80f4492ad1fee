# Tasks in 32-bit protected mode: the way there from 64-bit mode, what begins a task switch, and what is found after it.
# Selectors are those of task_switches.rs.

    .set FLAT_CODE, 0x08
    .set FLAT_DATA, 0x10
    .set OLD_TASK, 0x20
    .set CODE_64, 0x90
    .set LAST_TASK, 0x98
    .set TASK_APIC, 0xfee00000

    .section .text.tasks, "ax"
    .code64

# run_task(code, mode): RDI is the 32-bit code that begins the switch, RSI points to struct Mode.
    .global run_task
run_task:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    sgdt saved_gdt
    sidt saved_idt
    movq %rsp, saved_rsp
    movq %cr0, %rax
    movl %eax, saved_cr0
    movq %cr3, %rax
    movl %eax, saved_cr3
    movq %cr4, %rax
    movl %eax, saved_cr4
    movl %edi, task_code
    lgdt 16(%rsi)
    pushq $FLAT_CODE
    pushq $1f
    lretq

    .code32
1:  movl $FLAT_DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %fs
    movl %eax, %gs
    movl %eax, %ss
    movl (%esi), %ebx               # CR0 with paging or without it
    movl %ebx, %eax
    andl $0x7fffffff, %eax
    movl %eax, %cr0
    movl $0xc0000080, %ecx
    rdmsr
    andl $~0x100, %eax
    wrmsr
    movl 8(%esi), %eax
    movl %eax, %cr4
    movl 4(%esi), %eax
    movl %eax, %cr3
    movl %ebx, %cr0
    lidt 32(%esi)
    movl $0x155, %eax
    movl %eax, %dr7
    xorl %eax, %eax
    movl %eax, %dr6
    movl 12(%esi), %esp
    movl $OLD_TASK, %eax
    ltr %ax
    pushl $2
    popfl
    movl $0x11111111, %eax
    movl $0x22222222, %ecx
    movl $0x33333333, %edx
    movl $0x44444444, %ebx
    movl $0x55555555, %ebp
    movl $0x66666666, %esi
    movl $0x77777777, %edi
    jmpl *task_code

# Back to 64-bit mode, from the end of `record`.
leave_tasks:
    cli
    movl $LAST_TASK, %eax           # TR of a 16-bit task is not for IA-32e mode
    ltr %ax
    movl %cr0, %eax
    andl $0x7fffffff & ~8, %eax
    movl %eax, %cr0
    movl saved_cr4, %eax
    movl %eax, %cr4
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl saved_cr3, %eax
    movl %eax, %cr3
    movl saved_cr0, %eax
    movl %eax, %cr0
    xorl %eax, %eax
    lldt %ax
    movl $0x400, %eax
    movl %eax, %dr7
    ljmpl $CODE_64, $2f
    .code64
2:  lgdt saved_gdt
    lidt saved_idt
    movq saved_rsp, %rsp
    pushq $2                        # NT, above all, is not for IA-32e mode
    popfq
    movl $FLAT_DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    pushq $8                        # CODE of the image's own GDT
    pushq $3f
    lretq
3:  popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret

    .code32
# Handlers of 32 vectors, and of 0x20 to 0x30. Each records, with its number above what the processor has pushed.
    .balign 16
    .global task_vectors
task_vectors:
    .altmacro
    .macro task_vector number
    .balign 16
    pushl $\number
    jmp record
    .endm
    .set number, 0
    .rept 0x31
    task_vector %number
    .set number, number + 1
    .endr
    .noaltmacro

# The program of a new task.
    .global task_arrived
task_arrived:
    pushl $0x100
    jmp record
# The same at privilege level 3.
    .global task_arrived_as_user
task_arrived_as_user:
    int $0x30
# A new task that returns, and goes on behind its IRET when it is called again.
    .global task_returns
task_returns:
    incl %eax
    iretl
    pushl $0x102
    jmp record

# Everything that a program can see, into `task_record`: general-purpose registers, segment registers, TR, LDTR, CR0, CR3,
# DR6, DR7, and the stack from the vector's number on.
record:
    pushal
    pushfl
    pushl %ds
    pushl %es
    pushl %fs
    pushl %gs
    pushl %ss
    pushl %cs
    str %eax
    pushl %eax
    sldt %eax
    pushl %eax
    movl %cr0, %eax
    pushl %eax
    movl %cr3, %eax
    pushl %eax
    movl %dr6, %eax
    pushl %eax
    movl %dr7, %eax
    pushl %eax
    cld
    movl $FLAT_DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl $task_record, %edi
    movl $32, %ecx
4:  popl %eax
    stosl
    loop 4b
    jmp leave_tasks

# What begins a task switch. Who comes back goes to task_behind.
    .global task_jump
task_jump:
    ljmpl $0x28, $0
    jmp task_behind
    .global task_call
task_call:
    lcalll $0x28, $0
    jmp task_behind
    .global task_call_twice
task_call_twice:
    lcalll $0x28, $0
    lcalll $0x28, $0
    jmp task_behind
    .global task_jump_gate
task_jump_gate:
    ljmpl $0x40, $0
    .global task_call_gate
task_call_gate:
    lcalll $0x40, $0
    jmp task_behind
    .global task_jump_16
task_jump_16:
    ljmpl $0x30, $0
    .global task_call_16
task_call_16:
    lcalll $0x30, $0
    jmp task_behind
    .global task_indirect_jump
task_indirect_jump:
    pushl $0x28
    pushl $0
    ljmpl *(%esp)
    .global task_int
task_int:
    int $0x21
    jmp task_behind
    .global task_int3
task_int3:
    int3
    jmp task_behind
    .global task_ud
task_ud:
    ud2
    jmp task_behind
    .global task_gp
task_gp:
    movl $0xfff8, %eax
    movl %eax, %fs
    jmp task_behind
    .global task_page_fault
task_page_fault:
    movl 0xfff00000, %eax
    jmp task_behind
    .global task_return
task_return:
    pushl $0x4002
    popfl
    iretl
    jmp task_behind
    .global task_nmi
task_nmi:
    movl $0, TASK_APIC + 0x310
    movl $0x4400, TASK_APIC + 0x300
    nop
    nop
    nop
    jmp task_behind
    .global task_interrupt
task_interrupt:
    movl $0x44022, TASK_APIC + 0x300
    sti
    nop
    nop
    nop
    jmp task_behind
    .global task_jump_stepping
task_jump_stepping:
    pushl $0x102
    popfl
    ljmpl $0x28, $0
task_behind:
    pushl $0x101
    jmp record

# Copied below 1 MiB, for a task in virtual-8086 mode.
    .global task_in_virtual_8086_mode
task_in_virtual_8086_mode:
    int $0x30
    hlt

    .code64
    .section .bss.tasks, "aw", @nobits
    .balign 8
saved_gdt: .skip 16
saved_idt: .skip 16
saved_rsp: .skip 8
saved_cr0: .skip 4
saved_cr3: .skip 4
saved_cr4: .skip 4
task_code: .skip 4
    .global task_record
task_record: .skip 128

# From a multiboot 1 loader to long mode, and the exception vectors.
#
# The first 4 GiB are mapped to themselves. The second 512 GiB begin with an alias of the same memory for CPL 3,
# and continue with the pages that the operand cases access (see memory.rs).

    .set MAGIC, 0x1badb002
    .set LOADER_MAGIC, 0x2badb002
    .set ADDRESS_FIELDS, 1 << 16
    .set PRESENT_WRITE, 0x3
    .set PRESENT_WRITE_USER, 0x7
    .set LARGE, 0x80

    # QEMU, which does not load a 64-bit ELF file, loads this file by the address fields.
    .section .multiboot, "a"
    .balign 4
multiboot_header:
    .long MAGIC, ADDRESS_FIELDS, -(MAGIC + ADDRESS_FIELDS)
    .long multiboot_header, multiboot_header, file_end, local_end, _start

    .section .text.start, "ax"
    .code32
    .global _start
_start:
    cli
    cld
    movl $boot_stack_top, %esp
    cmpl $LOADER_MAGIC, %eax
    jne 9f

    # Page directories: 2048 large pages, once for the supervisor and once for CPL 3.
    xorl %ecx, %ecx
1:  movl %ecx, %eax
    shll $21, %eax
    orl $(PRESENT_WRITE | LARGE), %eax
    movl %eax, supervisor_pd(, %ecx, 8)
    orl $(PRESENT_WRITE_USER | LARGE), %eax
    movl %eax, user_pd(, %ecx, 8)
    incl %ecx
    cmpl $2048, %ecx
    jne 1b
    xorl %ecx, %ecx
2:  movl %ecx, %eax
    shll $12, %eax
    leal supervisor_pd + PRESENT_WRITE(%eax), %edx
    movl %edx, supervisor_pdpt(, %ecx, 8)
    leal user_pd + PRESENT_WRITE_USER(%eax), %edx
    movl %edx, user_pdpt(, %ecx, 8)
    incl %ecx
    cmpl $4, %ecx
    jne 2b
    movl $(supervisor_pdpt + PRESENT_WRITE), host_pml4
    movl $(user_pdpt + PRESENT_WRITE_USER), host_pml4 + 8

    movl $host_pml4, %eax
    movl %eax, %cr3
    movl $0x20, %eax                # PAE
    movl %eax, %cr4
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x900, %eax                # LME, NXE
    wrmsr
    movl $0x80010033, %eax          # PG, WP, NE, ET, MP, PE
    movl %eax, %cr0
    lgdt gdt_pointer
    ljmpl $0x08, $long_mode
9:  hlt
    jmp 9b

    .code64
long_mode:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    xorl %eax, %eax
    movw %ax, %fs
    movw %ax, %gs
    movq $boot_stack_top, %rsp
    movl %ebx, %edi                 # the loader's information
    call conformance_main
8:  hlt
    jmp 8b

# One entry of 16 bytes for each vector: its number, and a zero where the processor pushes no error code.
    .section .text.vectors, "ax"
    .balign 16
    .global exception_vectors
exception_vectors:
    .altmacro
    .macro vector number
    .balign 16
    .if (\number == 8) || ((\number >= 10) && (\number <= 14)) || (\number == 17) || (\number == 21)
    .else
    pushq $0
    .endif
    pushq $\number
    jmp exception_common
    .endm
    .set number, 0
    .rept 256
    vector %number
    .set number, number + 1
    .endr
    .noaltmacro

exception_common:
    pushq %rbx
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    cld
    leaq 72(%rsp), %rdi
    call handle_exception
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rdi
    popq %rsi
    popq %rdx
    popq %rcx
    popq %rax
    popq %rbx
    addq $16, %rsp
    iretq

# The nested guest's handlers: vector N is entered at nested_vectors + 8 * N and exits there.
    .balign 4096
    .global nested_vectors
nested_vectors:
    .rept 256
    .balign 8
    vmcall
    hlt
    .endr

    .section .data.gdt, "aw"
    .balign 4096
    .global gdt
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # 0x08: 64-bit code
    .quad 0x00cf93000000ffff        # 0x10: data
    .quad 0x00cf9b000000ffff        # 0x18: 32-bit code
    .quad 0, 0                      # 0x20: the host's TSS
    .quad 0x00cff3000000ffff        # 0x30: data for CPL 3
    .quad 0x00affb000000ffff        # 0x38: 64-bit code for CPL 3
    .quad 0, 0                      # 0x40: the nested guest's TSS
    .quad 0                         # 0x50: another 32-bit TSS
    .quad 0x0000850000500000        # 0x58: task gate to it
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt

    .section .bss.boot, "aw", @nobits
    .balign 4096
    .global host_pml4
    .global supervisor_pdpt
    .global supervisor_pd
    .global user_pdpt
    .global user_pd
    .global boot_stack_top
host_pml4:
    .skip 4096
supervisor_pdpt:
    .skip 4096
user_pdpt:
    .skip 4096
supervisor_pd:
    .skip 4 * 4096
user_pd:
    .skip 4 * 4096
    .skip 65536
boot_stack_top:

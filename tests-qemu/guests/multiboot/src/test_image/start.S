# From a multiboot 1 loader to 64-bit mode. Registers that the loader leaves undefined are not used.

    .set MAGIC, 0x1badb002
    .set LARGE_PRESENT_WRITE, 0x83
    .set PRESENT_WRITE, 0x3

    # No flags: the loader passes memory sizes and modules even if the image asks for nothing.
    .section .rodata.multiboot, "aR"
    .balign 4
    .long MAGIC, 0, -MAGIC

    .section .text
    .code32
    .global _start
_start:
    movl %ebx, %ebp                 # the multiboot information
    pushl %eax                      # on the stack that the loader left, as other images do
    popl %esi                       # the loader's magic
    movl $stack_top, %esp

    # The first 4 GiB, in 2 MiB pages.
    xorl %ecx, %ecx
1:  movl %ecx, %eax
    shll $21, %eax
    orl $LARGE_PRESENT_WRITE, %eax
    movl %eax, page_directories(, %ecx, 8)
    incl %ecx
    cmpl $2048, %ecx
    jne 1b
    movl $(page_directories + PRESENT_WRITE), %eax
    xorl %ecx, %ecx
2:  movl %eax, pdpt(, %ecx, 8)
    addl $4096, %eax
    incl %ecx
    cmpl $4, %ecx
    jne 2b
    movl $(pdpt + PRESENT_WRITE), pml4

    lgdt gdt_pointer
    movl $0x20, %eax                # PAE
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax                # LME
    wrmsr
    movl %cr0, %eax
    orl $0x80000021, %eax           # PG, NE, PE
    movl %eax, %cr0
    ljmpl $0x08, $long_mode

    .code64
long_mode:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl %esi, %edi
    movl %ebp, %esi
    call test_image_main
3:  hlt
    jmp 3b

# The code of another processor after INIT and SIPI, copied to address 0: it halts for ever.
    .code16
    .global startup_code
    .global startup_code_end
startup_code:
    cli
4:  hlt
    jmp 4b
startup_code_end:

    .section .data.gdt, "aw"
    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # 64-bit code
    .quad 0x00cf93000000ffff        # data
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt

    .section .bss.start, "aw", @nobits
    .balign 4096
    .global vmxon_region
    .global vmcs_region
vmxon_region:
    .skip 4096
vmcs_region:
    .skip 4096
pml4:
    .skip 4096
pdpt:
    .skip 4096
page_directories:
    .skip 4 * 4096
    .skip 16384
stack_top:

// The BIOS loads this at 7C00H and jumps there; DL is the drive.

.set SMAP, 0x534d4150
.set BUFFER, 0x600

.section .sector, "ax"
.code16
.global _start
_start:
    ljmpw $0, $(1f - _start + 0x7c00)
1:  xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    cld

    movw $(base_text - _start + 0x7c00), %si
    call say
    int $0x12
    call hex
    call newline

    movw $(calls - _start + 0x7c00), %di
2:  movw (%di), %ax
    testw %ax, %ax
    jz 3f
    movw $(call_text - _start + 0x7c00), %si
    call say
    call hex
    pushw %di
    int $0x15
    popw %di
    pushw %dx
    pushw %cx
    pushw %bx
    pushw %ax
    sbbw %ax, %ax                       // CF in each bit
    call hex
    popw %ax
    call hex
    popw %ax
    call hex
    popw %ax
    call hex
    popw %ax
    call hex
    call newline
    xorw %ax, %ax                       // call C000H changes ES
    movw %ax, %es
    addw $2, %di
    jmp 2b

3:  xorl %ebx, %ebx
4:  movl $0xe820, %eax
    movl $SMAP, %edx
    movl $24, %ecx
    movw $BUFFER, %di
    int $0x15
    jc 6f
    movw $(map_text - _start + 0x7c00), %si
    call say
    movw %cx, %ax
    call hex
    movw $BUFFER, %si
    movw $10, %cx                       // words
5:  lodsw
    call hex
    loop 5b
    call newline
    testl %ebx, %ebx
    jnz 4b

6:  xorl %eax, %eax
    movw ${exit_port}, %dx
    outl %eax, %dx
    cli                                 // a virtual machine without that port may notice this
7:  hlt
    jmp 7b

// Prints the text at SI.
say:
    pushw %ax
1:  lodsb
    testb %al, %al
    jz 2f
    outb %al, ${debug_port}
    jmp 1b
2:  popw %ax
    ret

newline:
    movb $'\n', %al
    outb %al, ${debug_port}
    ret

// Prints AX, with a space before it.
hex:
    pushw %ax
    pushw %cx
    pushw %bx
    movw %ax, %bx
    movb $' ', %al
    outb %al, ${debug_port}
    movw $4, %cx
1:  rolw $4, %bx
    movb %bl, %al
    andb $0xf, %al
    cmpb $10, %al
    jb 2f
    addb $('a' - '0' - 10), %al
2:  addb $'0', %al
    outb %al, ${debug_port}
    loop 1b
    popw %bx
    popw %cx
    popw %ax
    ret

calls:
    .word 0x8800, 0xe801, 0xe881, 0xda88, 0x8a00, 0xc700, 0xc000, 0
base_text:
    .asciz "sector: base:"
call_text:
    .asciz "sector: call"
map_text:
    .asciz "sector: map:"

    .org 510
    .word 0xaa55

.text
.code64

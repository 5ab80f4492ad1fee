    .set MAGIC, 0x1badb002
    .set MEMORY_INFO, 1 << 1
    .set LOADER_MAGIC, 0x2badb002
    .set HAS_COMMAND_LINE, 1 << 2
    .set HAS_MODULES, 1 << 3
    .set COM1, 0x3f8
    .set LINE_STATUS, COM1 + 5
    .set HOLDING_REGISTER_EMPTY, 1 << 5
    .set TRANSMITTER_EMPTY, 1 << 6

    .section .rodata.multiboot, "aR"
    .balign 4
    .long MAGIC, MEMORY_INFO, -(MAGIC + MEMORY_INFO)

    .section .text
    .code32
    .global _start
_start:
    cli
    movl $stack_top, %esp
    cmpl $LOADER_MAGIC, %eax
    jne shutdown
    movl %ebx, %ebp             # the multiboot information

    movl $command_line_text, %esi
    call print
    testl $HAS_COMMAND_LINE, (%ebp)
    jz 1f
    movl 16(%ebp), %esi
    call print
1:  movb $'\n', %al
    call put

    testl $HAS_MODULES, (%ebp)
    jz shutdown
    movl 20(%ebp), %edi         # modules left
    movl 24(%ebp), %ebx         # the next one
2:  testl %edi, %edi
    jz shutdown
    movl $module_text, %esi
    call print
    movl 8(%ebx), %esi
    call print
    movl $colon_text, %esi
    call print
    movl (%ebx), %esi           # its content, to its end
3:  cmpl 4(%ebx), %esi
    jae 4f
    lodsb
    call put
    jmp 3b
4:  movb $'\n', %al
    call put
    addl $16, %ebx
    decl %edi
    jmp 2b

shutdown:
    movl $LINE_STATUS, %edx     # the last characters are still on their way
9:  inb %dx, %al
    testb $TRANSMITTER_EMPTY, %al
    jz 9b
    movl ${shutdown_text}, %esi
    movl ${shutdown_length}, %ecx
    movl ${shutdown_port}, %edx
    rep outsb
5:  cli
    hlt
    jmp 5b

# Prints the string at ESI.
print:
    lodsb
    testb %al, %al
    jz 7f
    call put
    jmp print
7:  ret

# Prints AL.
put:
    movb %al, %ah
    movl $LINE_STATUS, %edx
8:  inb %dx, %al
    testb $HOLDING_REGISTER_EMPTY, %al
    jz 8b
    movb %ah, %al
    movl $COM1, %edx
    outb %al, %dx
    ret

    .section .rodata.text, "a"
command_line_text:
    .asciz "multiboot guest: command line: "
module_text:
    .asciz "multiboot guest: module "
colon_text:
    .asciz ": "

    .section .bss
    .balign 16
    .skip 4096
stack_top:

// Where processors go that a SIPI starts only to be counted: at the beginning of a page below 1 MiB. Each enters its APIC id into the
// list at the end of the page's code, and halts until an INIT.

.section .rodata.roll_call, "a"
.balign 16
.code16
.global roll_call_start
roll_call_start:
    cli
    movw %cs, %ax
    movw %ax, %ds
    // The id of the topology leaf, or of leaf 1 in a processor without that leaf.
    xorl %eax, %eax
    cpuid
    cmpl $0xB, %eax
    jb 1f
    movl $0xB, %eax
    xorl %ecx, %ecx
    cpuid
    testl %ebx, %ebx
    jz 1f
    movl %edx, %esi
    jmp 2f
1:
    movl $1, %eax
    cpuid
    shrl $24, %ebx
    movl %ebx, %esi
2:
    movl $1, %ebx
    lock xaddl %ebx, roll_call_list - roll_call_start
    cmpl ${most}, %ebx
    jae 3f
    movl %esi, (roll_call_list - roll_call_start + 8)(, %ebx, 4)
3:
    lock incl roll_call_list - roll_call_start + 4
4:
    hlt
    jmp 4b

.balign 8
.global roll_call_list
roll_call_list:                         // `entry::RollCallList`
    .long 0                             // have come
    .long 0                             // have entered their id
    .fill {most}, 4, 0
.global roll_call_end
roll_call_end:

.text

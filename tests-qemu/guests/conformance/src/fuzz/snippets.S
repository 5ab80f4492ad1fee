# What nested guests of random programs execute: the same instructions for 16-bit, 32-bit and 64-bit code, one in each
# slot of 32 bytes. The image copies them below 1 MiB, where code of every mode reaches them. Each ends with VMCALL.
# The order is that of snippets.rs.

    .altmacro
    .macro slot first:req, second, third
    .balign 32, 0xf4
    \first
    \second
    \third
    vmcall
    hlt
    .endm

    # An instruction that takes another register in 64-bit code.
    .macro wide long, short
    .balign 32, 0xf4
    .if BITS == 64
    \long
    .else
    \short
    .endif
    vmcall
    hlt
    .endm

    .macro snippets
    slot nop
    slot cpuid
    slot hlt
    slot pause
    slot rdmsr
    slot wrmsr
    slot <inb %dx, %al>
    slot <outb %al, %dx>
    slot insb
    slot <rep outsl>
    wide <movq %cr0, %rax>, <movl %cr0, %eax>
    wide <movq %rax, %cr0>, <movl %eax, %cr0>
    wide <movq %cr3, %rax>, <movl %cr3, %eax>
    wide <movq %rax, %cr3>, <movl %eax, %cr3>
    wide <movq %cr4, %rax>, <movl %cr4, %eax>
    wide <movq %rax, %cr4>, <movl %eax, %cr4>
    wide <movq %rax, %cr8>, clts
    wide <movq %cr8, %rax>, clts
    slot clts
    slot <lmsw %ax>
    slot <smsw %ax>
    wide <movq %rax, %dr7>, <movl %eax, %dr7>
    wide <invlpg (%rdx)>, <invlpg (%edx)>
    slot invd
    slot wbinvd
    slot int3
    slot <int $0x21>
    slot ud2
    slot rdtsc, <xorl %eax, %eax>, <xorl %edx, %edx>
    slot rdpmc
    wide <movl (%rdx), %eax>, <movl (%edx), %eax>
    wide <movl %eax, (%rdx)>, <movl %eax, (%edx)>
    wide <lock incl (%rdx)>, <lock incl (%edx)>
    wide <jmp *%rdx>, <jmp *%edx>
    wide <pushq %rax>, <pushl %eax>
    wide <sgdt (%rdx)>, <sgdt (%edx)>
    wide <lidt (%rdx)>, <lidt (%edx)>
    slot <str %ax>
    slot <ltr %ax>
    slot sti, nop
    slot <movw %ax, %ss>, nop
    slot <.byte 0xf1>
    slot <xorl %ecx, %ecx>, <divl %ecx>
    wide <vmptrst (%rdx)>, <vmptrst (%edx)>
    wide <vmread %rcx, %rax>, <vmread %ecx, %eax>
    slot vmfunc
    slot xsetbv
    slot sysenter
    slot syscall
    wide swapgs, nop
    wide <invpcid (%rdx), %rax>, <invpcid (%edx), %eax>
    wide <vmwrite %rax, %rcx>, <vmwrite %eax, %ecx>
    slot popf
    slot <movw %ax, %ds>
    slot cpuid, cpuid, cpuid
    slot sti, hlt
    .endm

    .pushsection .rodata.snippets, "a"
    .balign 32
    .global fuzz_snippets
    .global fuzz_snippets_end
fuzz_snippets:
    .code16
    .set BITS, 16
    snippets
    .balign 32, 0xf4
    .code32
    .set BITS, 32
    snippets
    .balign 32, 0xf4
    .code64
    .set BITS, 64
    snippets
    .balign 32, 0xf4
fuzz_snippets_end:
    .popsection
    .noaltmacro

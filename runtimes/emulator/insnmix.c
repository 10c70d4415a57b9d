/* A plugin for QEMU's user mode (plugin API version 1): executed AArch64 instructions by kind.
 *
 * The program that is emulated marks a region with a system call that no kernel has:
 * syscall(0xC0DE, 1, tag) begins it, syscall(0xC0DE, 2, tag) ends it, and one line of JSON is
 * written. Every translated block has one counter of its executions and a histogram of its
 * instructions; the two are multiplied when a region ends, so counting costs little. Exact for one
 * thread: those of several race for the counters.
 *
 * The functions of the API are declared here, so no header of QEMU is needed; only functions of the C
 * library that every version has under one name are used, so that it loads on older systems too. */
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;

#define VISIBLE __attribute__((visibility("default")))
VISIBLE int qemu_plugin_version = 1;

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
void qemu_plugin_register_vcpu_syscall_cb(plugin_id, void (*)(plugin_id, unsigned, int64_t, uint64_t, uint64_t,
    uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);

enum kind { SDOT, UDOT, USDOT, MMLA, WIDENING_8, WIDENING_16, FMLA_32, FMLA_16, BFLOAT, SVE, SIMD_LOAD, SIMD_STORE,
    SIMD_OTHER, LOAD, STORE, BRANCH, INTEGER, OTHER, KINDS };
static const char *names[KINDS] = { "sdot", "udot", "usdot", "mmla", "widening_8", "widening_16", "fmla_32",
    "fmla_16", "bfloat", "sve", "simd_load", "simd_store", "simd_other", "load", "store", "branch", "integer", "other" };

static bool is(uint32_t word, uint32_t mask, uint32_t value) { return (word & mask) == value; }

/* By the encoding tables of the Arm Architecture Reference Manual, "Data processing - SIMD and floating point":
 * three registers, of different lengths, of one length, by element. */
static enum kind kind_of(uint32_t word)
{
    if (is(word, 0xbfe0fc00, 0x0e809400) || is(word, 0xbfc0f400, 0x0f80e000))
        return SDOT;
    if (is(word, 0xbfe0fc00, 0x2e809400) || is(word, 0xbfc0f400, 0x2f80e000))
        return UDOT;
    if (is(word, 0xbfe0fc00, 0x0e809c00) || is(word, 0xbfc0f400, 0x0f80f000) || is(word, 0xbfc0f400, 0x0f00f000))
        return USDOT;
    if (is(word, 0xdfe0fc00, 0x4e80a400) || is(word, 0xffe0fc00, 0x4e80ac00))
        return MMLA;
    if (is(word, 0xffe0fc00, 0x6e40ec00) || is(word, 0xbfe0fc00, 0x2e40fc00) || is(word, 0xbfc0f400, 0x0f40f000))
        return BFLOAT;
    if (is(word, 0x9f20dc00, 0x0e208000) || is(word, 0x9f20fc00, 0x0e20c000))
        return (word >> 22 & 3) ? WIDENING_16 : WIDENING_8;
    if (is(word, 0x9f00f400, 0x0f002000) || is(word, 0x9f00f400, 0x0f00a000))
        return WIDENING_16;
    if (is(word, 0xbfa0fc00, 0x0e20cc00) || is(word, 0xbf80f400, 0x0f801000))
        return FMLA_32;
    if (is(word, 0xbfe0fc00, 0x0e400c00) || is(word, 0xbfc0f400, 0x0f001000))
        return FMLA_16;
    uint32_t group = word >> 25 & 15;
    if (group == 2)
        return SVE;
    if ((group & 5) == 4) {
        bool simd = word >> 26 & 1, load = word >> 22 & 1;
        if (is(word, 0x3b000000, 0x18000000)) /* of a literal */
            load = true;
        else if (!simd && is(word, 0x3a000000, 0x38000000))
            load = (word >> 22 & 3) != 0;
        return simd ? (load ? SIMD_LOAD : SIMD_STORE) : (load ? LOAD : STORE);
    }
    if ((group & 7) == 7)
        return SIMD_OTHER;
    if ((group & 14) == 10)
        return BRANCH;
    if ((group & 14) == 8 || (group & 7) == 5)
        return INTEGER;
    return OTHER;
}

struct block {
    uint64_t executed;
    uint32_t length;
    uint16_t counts[KINDS];
    struct block *next;
};
static struct block *blocks;
static FILE *out;
static bool marked;

static void on_block(plugin_id id, struct qemu_plugin_tb *translated)
{
    struct block *block = calloc(1, sizeof *block), *first = __atomic_load_n(&blocks, __ATOMIC_ACQUIRE);

    (void)id;
    if (!block)
        abort(); /* a count that leaves something out is worse than none */
    block->length = qemu_plugin_tb_n_insns(translated);
    for (size_t index = 0; index < block->length; index++) {
        uint32_t word;
        memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(translated, index)), sizeof word);
        block->counts[kind_of(word)]++;
    }
    do
        block->next = first;
    while (!__atomic_compare_exchange_n(&blocks, &first, block, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
    qemu_plugin_register_vcpu_tb_exec_inline(translated, 0, &block->executed, 1);
}

static void report(uint64_t tag)
{
    uint64_t sums[KINDS] = { 0 }, total = 0;

    for (struct block *block = blocks; block; block = block->next) {
        total += block->executed * block->length;
        for (int kind = 0; kind < KINDS; kind++)
            sums[kind] += block->executed * block->counts[kind];
    }
    fprintf(out, "{\"tag\":%" PRIu64 ",\"total\":%" PRIu64, tag, total);
    for (int kind = 0; kind < KINDS; kind++)
        fprintf(out, ",\"%s\":%" PRIu64, names[kind], sums[kind]);
    fprintf(out, "}\n");
    fflush(out);
}

static void on_syscall(plugin_id id, unsigned cpu, int64_t number, uint64_t what, uint64_t tag, uint64_t a3,
    uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8)
{
    (void)id, (void)cpu, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number != 0xC0DE)
        return;
    if (what == 1) {
        for (struct block *block = blocks; block; block = block->next)
            block->executed = 0;
        marked = true;
    } else if (what == 2 && marked) {
        report(tag);
        marked = false;
    }
}

VISIBLE int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv)
{
    (void)info;
    for (int index = 0; index < argc; index++)
        if (!strncmp(argv[index], "out=", 4))
            out = fopen(argv[index] + 4, "a");
    if (!out)
        return -1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_block);
    qemu_plugin_register_vcpu_syscall_cb(id, on_syscall);
    return 0;
}

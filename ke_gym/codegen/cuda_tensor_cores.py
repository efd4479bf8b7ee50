"""What CUDA C++ kernels on Hopper's tensor cores call: barriers, bulk copies, transposition, warpgroup products.

Sources: PTX ISA 8.x, "Asynchronous warpgroup level matrix instructions", "cp.async.bulk.tensor", "mbarrier".
"""

from __future__ import annotations

_DEVICE = "__device__ __forceinline__"

HELPERS = f"""\
{_DEVICE} unsigned in_shared(const void* at) {{ return (unsigned)__cvta_generic_to_shared(at); }}

{_DEVICE} void begin(unsigned barrier, int arrivals) {{
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}}

{_DEVICE} void arrive(unsigned barrier) {{
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}}

{_DEVICE} void await(unsigned barrier, int phase) {{
  asm volatile(
      "{{\\n.reg .pred done;\\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\\n@!done bra again;\\n}}"
      :: "r"(barrier), "r"(phase & 1) : "memory");
}}

// The threads that meet under one number go on together.
template <int NUMBER, int THREADS>
{_DEVICE} void meet() {{ asm volatile("bar.sync %0, %1;" :: "n"(NUMBER), "n"(THREADS) : "memory"); }}

// What this thread wrote to shared memory is seen by bulk copies and tensor cores.
{_DEVICE} void publish() {{ asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }}

// Four matrices of 8 x 8 halves, transposed; each lane names a row of one.
{_DEVICE} void take(unsigned (&four)[4], unsigned from) {{
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{%0, %1, %2, %3}}, [%4];"
               : "=r"(four[0]), "=r"(four[1]), "=r"(four[2]), "=r"(four[3]) : "r"(from) : "memory");
}}

{_DEVICE} void put(unsigned to, const unsigned (&four)[4]) {{
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {{%1, %2, %3, %4}};"
               :: "r"(to), "r"(four[0]), "r"(four[1]), "r"(four[2]), "r"(four[3]) : "memory");
}}

// Two matrices, the second below the first.
{_DEVICE} void put(unsigned to, unsigned upper, unsigned lower) {{
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {{%1, %2}};"
               :: "r"(to), "r"(upper), "r"(lower) : "memory");
}}

// A matrix whose rows of 8 halves follow each other, the next 8 columns `across` bytes away: it may begin at any row.
{_DEVICE} unsigned long long matrix(unsigned at, unsigned across) {{
  return (unsigned long long)(at >> 4) | (unsigned long long)(across >> 4) << 16 | 8ull << 32;
}}

{_DEVICE} void open_products() {{ asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }}

{_DEVICE} void close_products() {{ asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }}

// The sums are there; nothing that reads them moves before this.
template <int COUNT>
{_DEVICE} void await_products(float (&sums)[COUNT]) {{
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  #pragma unroll
  for (int k = 0; k < COUNT; ++k) asm volatile("" : "+f"(sums[k]) :: "memory");
}}
"""

BULK = f"""\
struct alignas(64) CUtensorMap {{
  unsigned long long opaque[16];
}};

{_DEVICE} void expect(unsigned barrier, int bytes) {{
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}}

// A tile of a tensor, zeros where it reaches beyond.
{_DEVICE} void fetch(unsigned to, const CUtensorMap& from, unsigned barrier, int x, int y, int z) {{
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {{%3, %4, %5}}], [%2];"
      :: "r"(to), "l"(&from), "r"(barrier), "r"(x), "r"(y), "r"(z) : "memory");
}}

{_DEVICE} void send(const CUtensorMap& to, unsigned from, int x, int y, int z) {{
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {{%2, %3, %4}}], [%1];\\ncp.async.bulk.commit_group;"
      :: "l"(&to), "r"(from), "r"(x), "r"(y), "r"(z) : "memory");
}}

// The shared memory that was sent from may be written again.
{_DEVICE} void await_sent() {{ asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }}
"""

SWIZZLED = f"""\
// A matrix in rows of 128 bytes, swizzled; eight of them begin at a multiple of 1024 bytes, the next eight follow. Where
// what is summed over is not contiguous, a row has 64 elements along the other dimension: the next 64 are `across` bytes on.
{_DEVICE} unsigned long long swizzled(unsigned at, unsigned across = 16) {{
  return (unsigned long long)(at >> 4) | (unsigned long long)(across >> 4) << 16 | 64ull << 32 | 1ull << 62;
}}

// All but the last COUNT groups of products are finished: what they read may be overwritten.
template <int COUNT>
{_DEVICE} void leave_products() {{ asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(COUNT) : "memory"); }}
"""

READ = f"""\
// Four matrices of 8 x 8 halves; each lane names a row of one.
{_DEVICE} void read(unsigned (&four)[4], unsigned from) {{
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%0, %1, %2, %3}}, [%4];"
               : "=r"(four[0]), "=r"(four[1]), "=r"(four[2]), "=r"(four[3]) : "r"(from) : "memory");
}}
"""

ONLINE = f"""\
// What was done to these registers comes before the products that follow.
template <int COUNT>
{_DEVICE} void settle(float (&sums)[COUNT]) {{
  #pragma unroll
  for (int k = 0; k < COUNT; ++k) asm volatile("" : "+f"(sums[k]) :: "memory");
}}

template <int COUNT>
{_DEVICE} void settle(unsigned (&words)[COUNT]) {{
  #pragma unroll
  for (int k = 0; k < COUNT; ++k) asm volatile("" : "+r"(words[k]) :: "memory");
}}

// How many registers each thread of a warpgroup has from here on.
template <int COUNT>
{_DEVICE} void take_registers() {{ asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT)); }}

template <int COUNT>
{_DEVICE} void leave_registers() {{ asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT)); }}

// A warpgroup waits under a number until another one lets it go on.
{_DEVICE} void await_turn(int number) {{ asm volatile("bar.sync %0, 256;" :: "r"(number) : "memory"); }}

{_DEVICE} void give_turn(int number) {{ asm volatile("bar.arrive %0, 256;" :: "r"(number) : "memory"); }}

// NaN wins, as in torch.
{_DEVICE} float highest(float a, float b) {{
  float both;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(both) : "f"(a), "f"(b));
  return both;
}}

{_DEVICE} float power_of_two(float x) {{
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}}
"""


def fetch(rank: int) -> str:
    """A tile of a tensor of ``rank`` dimensions, coordinates innermost first, zeros where it reaches beyond."""
    names = [f"x{k}" for k in range(rank)]
    given = ", ".join(f"int {name}" for name in names)
    listed = ", ".join(f"%{k + 3}" for k in range(rank))
    bound = ", ".join(f'"r"({name})' for name in names)
    return f"""\
{_DEVICE} void fetch(unsigned to, const CUtensorMap& from, unsigned barrier, {given}) {{
  asm volatile(
      "cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {{{listed}}}], [%2];"
      :: "r"(to), "l"(&from), "r"(barrier), {bound} : "memory");
}}
"""


def multiply(n: int, dtype: str, turned: tuple[str, ...] = ()) -> str:
    """``sums (+)= a b``: 64 rows by ``n`` columns in a warpgroup's registers, both operands in shared memory.

    ``dtype``: "f16", "bf16" or "tf32". Of the operands ("left", "right") that are ``turned``, what is summed over is not
    contiguous; the function's name ends with them.
    """
    count = n // 2
    depth, sides = (
        (8, "") if dtype == "tf32" else (16, f", {int('left' in turned)}, {int('right' in turned)}")
    )
    name = "_".join(["multiply", dtype, *turned])
    results = [f"%{k}" for k in range(count)]
    rows = ["    " + ", ".join(results[k : k + 16]) for k in range(0, count, 16)]
    listed = ',"\n      "'.join(row.strip() for row in rows)
    bound = [f'"+f"(sums[{k}])' for k in range(count)]
    held = ",\n        ".join(", ".join(bound[k : k + 8]) for k in range(0, count, 8))
    return f"""\
{_DEVICE} void {name}(float (&sums)[{count}], unsigned long long a, unsigned long long b, bool add) {{
  asm volatile(
      "{{\\n.reg .pred add;\\nsetp.ne.b32 add, %{count + 2}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{n}k{depth}.f32.{dtype}.{dtype} {{"
      "{listed}"
      "}}, %{count}, %{count + 1}, add, 1, 1{sides};\\n}}"
      : {held}
      : "l"(a), "l"(b), "r"((int)add));
}}
"""


def multiply_held(n: int, dtype: str) -> str:
    """``sums += a b``: 64 rows of ``a`` in the warpgroup's registers, ``b`` in shared memory, its rows contiguous."""
    count = n // 2
    results = [f"%{k}" for k in range(count)]
    rows = [", ".join(results[k : k + 16]) for k in range(0, count, 16)]
    listed = ',"\n      "'.join(rows)
    bound = [f'"+f"(sums[{k}])' for k in range(count)]
    held = ",\n        ".join(", ".join(bound[k : k + 8]) for k in range(0, count, 8))
    words = ", ".join(f"%{count + k}" for k in range(4))
    return f"""\
{_DEVICE} void multiply_held_{dtype}(
    float (&sums)[{count}], unsigned a, unsigned b, unsigned c, unsigned d, unsigned long long right) {{
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{dtype}.{dtype} {{"
      "{listed}"
      "}}, {{{words}}}, %{count + 4}, 1, 1, 1, 1;"
      : {held}
      : "r"(a), "r"(b), "r"(c), "r"(d), "l"(right));
}}
"""


def pack(dtype: str) -> str:
    """Two floats as halves, the first in the lower bits."""
    return f"""\
{_DEVICE} unsigned pack_{dtype}(float low, float high) {{
  unsigned both;
  asm("cvt.rn.{dtype}x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}}
"""


def product(dtype: str) -> str:
    """``sums += a b``: 16 rows by 8 columns in a warp's registers, both operands in its registers too."""
    return f"""\
{_DEVICE} void product_{dtype}(
    float (&sums)[4], unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned f) {{
  asm("mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
      "{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a), "r"(b), "r"(c), "r"(d), "r"(e), "r"(f));
}}
"""


def helpers(used: set[str]) -> list[str]:
    """The text of the helpers that are used: "bulk", "fetch 4", "tensor_cores", "swizzled", "read", "online",
    "multiply 200 f16", "multiply 64 f16 right", "held 128 f16", "product f16", "pack f16"."""
    blocks = (
        ("bulk", BULK), ("tensor_cores", HELPERS), ("swizzled", SWIZZLED), ("read", READ), ("online", ONLINE),
    )  # fmt: skip
    texts = [text for name, text in blocks if name in used]
    for name in sorted(used):
        kind, *rest = name.split()
        if kind == "multiply":
            texts.append(multiply(int(rest[0]), rest[1], tuple(rest[2:])))
        elif kind == "held":
            texts.append(multiply_held(int(rest[0]), rest[1]))
        elif kind == "fetch":
            texts.append(fetch(int(rest[0])))
        elif kind in ("pack", "product"):
            texts.append((pack if kind == "pack" else product)(rest[0]))
    return texts

"""Products whose sums several blocks share -> CUDA C++: what each stores, and the kernel that adds it up."""

from __future__ import annotations

from dataclasses import replace

from ke_gym.codegen import emit_cuda_products
from ke_gym.codegen.emit_cuda_products import Along
from ke_gym.codegen.expr import Load, Var, of, walk
from ke_gym.codegen.graph import Buffer, contiguous_stride
from ke_gym.codegen.matmuls import Matmul
from ke_gym.codegen.products import Store
from ke_gym.codegen.tiles import joined

SUMMING = 256  # threads of a block


def partial(matmul: Matmul) -> Matmul:
    """The product whose blocks store their part of each sum."""
    shape, split = matmul.shape, matmul.blocks.split
    sizes = (split, shape.batch, shape.m, shape.n)
    parts = Buffer(f"{matmul.name}_parts", sizes, contiguous_stride(sizes), "f32")
    place = joined(of(Var("part", split)) * (shape.batch * shape.m * shape.n) + matmul.order)
    sums = Load(matmul.name, (), "f32")
    reads = tuple(
        b for b in matmul.reads if b.name in {n.buffer for n in walk(*matmul.operands) if isinstance(n, Load)}
    )
    return replace(matmul, stores=(Store(parts, place, sums),), reads=reads, writes=(parts,))


class Total(emit_cuda_products.Printer[Matmul]):
    """Prints the kernel that adds parts up and stores the results, an element a thread."""

    def __init__(self, matmul: Matmul, used: set[str]) -> None:
        super().__init__(matmul, used)
        (self.parts,) = partial(matmul).writes
        read = {n.buffer for s in matmul.stores for n in walk(s.expr) if isinstance(n, Load) and n.index}
        self.pointers = [b.name for b in matmul.reads if b.name in read] + [b.name for b in matmul.writes]

    @property
    def blocks(self) -> int:
        return -(-self.parts.numel // self.parts.shape[0] // SUMMING)

    def body(self) -> list[str]:
        """The kernel's statements, line by line."""
        split, batch, rows, columns = self.parts.shape
        size = batch * rows * columns
        kind = "long long" if split * size >= 1 << 31 else self.int
        lines = [
            f"const {kind} at = {'(long long)' if kind != 'int' else ''}blockIdx.x * {SUMMING} + threadIdx.x;",
            f"if (at >= {size}) return;",
            "float total = 0.0f;",
            "#pragma unroll",
            f"for (int part = 0; part < {split}; ++part) total += {self.parts.name}[part * ({kind}){size} + at];",
        ]
        if batch > 1:
            lines.append(f"const {self.int} batch = at / {rows * columns};")
        where = f"at / {columns}" + (f" % {rows}" if batch > 1 else "")
        along = (Along("m", where, rows, False), Along("n", f"at % {columns}", columns, False))
        return [*lines, *self.element("total", along, False)]

"""`Candidate`: one immutable kernel module, known by what it says rather than how it is laid out."""

from __future__ import annotations

import ast
import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ke_gym import syntax
from ke_gym.errors import UserError

# Two sources that differ in what these read do different things.
_READS_ITSELF = re.compile(
    r"__doc__|__file__|__LINE__|__code__|getsource|getdoc|linecache|lineno|inspect|source_location"
)
_C_TOKEN = re.compile(
    r"""//(?:\\\n|[^\n])*|/\*.*?\*/|(?P<keep>R"(?P<tag>[^(\s]*)\(.*?\)(?P=tag)"|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')""",
    re.DOTALL,
)


@dataclass(frozen=True)
class Candidate:
    """A kernel module and where it came from.

    ``source`` is the module's Python text, ``language`` the one its kernels are written in, ``parent`` the
    ``id`` of the candidate it was made from, ``strategy`` and ``proposer`` say how. Two candidates whose
    sources differ only in comments, docstrings and formatting have the same ``id``.
    """

    source: str
    language: str = "cpp"
    parent: str | None = None
    strategy: str | None = None
    proposer: str = "user"

    @cached_property
    def id(self) -> str:
        """16 hex digits: the hash of the language and the normalized source."""
        return hashlib.sha256(f"{self.language}\0{normalize(self.source)}".encode()).hexdigest()[:16]

    @classmethod
    def from_file(cls, path: str | Path, language: str = "cpp") -> Candidate:
        """The kernel module in a file. Raises ``UserError`` if it cannot be read."""
        try:
            return cls(Path(path).read_text(encoding="utf-8-sig"), language)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); give a Python kernel module") from error


def normalize(source: str) -> str:
    """The source without comments, docstrings and formatting, in the Python and in its C++ literals.

    A source that is no Python, or that reads its own text, is only stripped of trailing blanks and empty lines.
    """
    try:
        if _READS_ITSELF.search(source):
            raise ValueError("its comments and lines may matter")
        tree = _Plain().visit(syntax.parse(source))
        return ast.unparse(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "\n".join(line.rstrip() for line in source.strip().splitlines() if line.strip())


class _Plain(ast.NodeTransformer):
    """Removes docstrings and normalizes the string literals that hold C++."""

    def _undocumented(self, node: ast.AST) -> ast.AST:
        body: list[ast.stmt] = node.body  # type: ignore[attr-defined]
        if body and ast.get_docstring(node, clean=False) is not None:  # type: ignore[arg-type]
            body[:1] = [] if len(body) > 1 else [ast.Pass()]
        return self.generic_visit(node)

    visit_Module = visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _undocumented

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if isinstance(node.value, str) and 'extern "C"' in node.value:
            return ast.Constant(normalize_cpp(node.value))
        return node


def normalize_cpp(source: str) -> str:
    """C++ without comments and with white space only where it separates something."""
    literals: list[str] = []

    def replaced(match: re.Match[str]) -> str:
        if match["keep"] is None:
            return " "
        literals.append(match["keep"])
        return f"\1{len(literals) - 1}\1"

    lines = _C_TOKEN.sub(replaced, source).replace("\\\n", " ").splitlines()
    text = ""
    for line in lines:
        words = " ".join(line.split())
        if words.startswith("#"):  # a directive ends with its line, and blanks can matter in it
            text = f"{text.rstrip()}\n{words}\n"
        else:
            text += f" {words}"
    # A blank matters only between two words, or between two operators that could merge.
    text = re.sub(r" +", " ", text).strip()
    text = re.sub(r"\n [^\S\n]*", "\n", text)
    text = re.sub(rf"{_DIRECTIVE}|(?<=\w) (?=[^\w\s])|(?<=[^\w\s]) (?=\w)|{_BY_BRACKET}", _tight, text)
    return re.sub("\1(\\d+)\1", lambda match: literals[int(match[1])], text)


_DIRECTIVE = r"(?m:^#.*$)"
_BY_BRACKET = r"(?<=[][(){};,]) | (?=[][(){};,])"


def _tight(match: re.Match[str]) -> str:
    return match[0] if match[0].startswith("#") else ""

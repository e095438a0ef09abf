"""Which modules are mutated, and which tests are to notice: the narrowest ones, the quickest first."""

from __future__ import annotations

_FILES = ("test_safetensors_reader.py", "test_checkpoint_folder.py", "test_attacks.py")
_KERNELS = ("test_kernels.py", "test_order.py")

GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "reader": {
        "checkpoint/base.py": (*_FILES, "test_checkpoint_memory.py"),
        "checkpoint/documents.py": ("test_documents.py", *_FILES),
        "checkpoint/folder.py": _FILES,
        "checkpoint/place.py": _FILES,
        "checkpoint/safetensors.py": _FILES,
        "checkpoint/selection.py": _FILES,
        "checkpoint/side.py": _FILES,
        "checkpoint/stored.py": _FILES,
    },
    "writer": {
        "checkpoint/writer.py": ("test_writer.py",),
        "engine/journal.py": ("test_resume.py",),
        "engine/publish.py": ("test_publish.py",),
        "engine/residue.py": ("test_resume.py",),
    },
    "storage": {
        "storage.py": ("test_storage.py", "test_publish.py", "test_resume.py"),
    },
    "kernels": {
        "kernels/arrays.py": _KERNELS,
        "kernels/blas.py": ("test_spectral.py",),
        "kernels/blocks.py": ("test_gguf_blocks.py",),
        "kernels/broadcast.py": ("test_rows.py", "test_projections.py"),
        "kernels/compile.py": _KERNELS,
        "kernels/dequantise.py": ("test_quantised.py",),
        "kernels/dtypes.py": _KERNELS,
        "kernels/float8.py": ("test_float8.py",),
        "kernels/functions.py": ("test_consensus.py",),
        "kernels/generate.py": _KERNELS,
        "kernels/launch.py": _KERNELS,
        "kernels/lowrank.py": ("test_adapted_models.py",),
        "kernels/native.py": _KERNELS,
        "kernels/order.py": ("test_order.py",),
        "kernels/program.py": _KERNELS,
        "kernels/random.py": _KERNELS,
        "kernels/scalars.py": _KERNELS,
        "kernels/source.py": _KERNELS,
        "kernels/sums.py": _KERNELS,
        "kernels/vocabulary.py": _KERNELS,
    },
}

#: Modules that put code together as text.
GENERATING = {"kernels/generate.py"}

#: A mutant whose tests take longer counts as killed. Those of kernels may have all of them compiled anew.
SECONDS = {"reader": 40, "writer": 40, "storage": 40, "kernels": 240}

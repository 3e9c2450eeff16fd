"""Matrix products, inverses and pseudo-inverses for kernels, through SciPy's BLAS and LAPACK.

Numba's own linear algebra uses the same routines, so that results equal NumPy's to the last bit.
"""

import llvmlite.binding
import numpy as np
from numba.extending import get_cython_function_address

from sacflow_robot.envs.fast.jit import external, kernel
from sacflow_robot.envs.fast.step_data import ARM, Reals, Scratch


def _load_routines() -> None:
    """Make the routines known by name to what Numba compiles, now and from its cache."""
    lapack = ("dgebd2", "dbdsqr", "dorm2r", "dorml2", "dgetrf", "dgetri")
    for module, names in (("blas", ("dgemm", "dgemv")), ("lapack", lapack)):
        for name in names:
            address = get_cython_function_address(f"scipy.linalg.cython_{module}", name)
            llvmlite.binding.add_symbol(f"sacflow_{name}", address)


_load_routines()

# All of their arguments are addresses.
_dgemm = external("sacflow_dgemm", 13)
_dgemv = external("sacflow_dgemv", 11)
_dgebd2 = external("sacflow_dgebd2", 10)
_dbdsqr = external("sacflow_dbdsqr", 15)
_dorm2r = external("sacflow_dorm2r", 12)
_dorml2 = external("sacflow_dorml2", 12)
_dgetrf = external("sacflow_dgetrf", 6)
_dgetri = external("sacflow_dgetri", 7)


@kernel
def make_scratch() -> Scratch:
    return Scratch(
        np.empty((6, ARM)), np.empty(6), np.empty((ARM, ARM)), np.empty((ARM, ARM)), np.empty((6, ARM)), np.empty((6, 6)),
        np.empty((3, 3)), np.empty((3, 3)), np.empty((ARM, 6)), np.empty((ARM, 6)), np.empty((ARM, ARM)), np.empty(ARM),
        np.empty(ARM), np.empty(ARM), np.empty(6), np.empty(6), np.empty(ARM), np.empty(3), np.empty((3, 3)),
        np.empty((3, 3)), np.empty(3), np.empty(78), np.empty(600), np.zeros(64, np.int32), np.empty((3, ARM)), np.arange(1024).astype(np.int32),
        np.array([78, 84, 76, 82, 85], np.uint8), np.array([1.0, 0.0]),
    )  # fmt: skip


@kernel
def times(x: int, x_turned: bool, y: int, y_turned: bool, out: int, m: int, k: int, n: int, s: Scratch) -> None:
    """out (m, n) = x (m, k) @ y (k, n), given by their addresses; those turned are stored by columns, the others by rows."""
    letter, count, constant = s.letters.ctypes.data, s.counts.ctypes.data, s.constants.ctypes.data
    _dgemm(
        letter + y_turned, letter + x_turned, count + 4 * n, count + 4 * m, count + 4 * k, constant,
        y, count + 4 * (k if y_turned else n), x, count + 4 * (m if x_turned else k), constant + 8, out, count + 4 * n,
    )  # fmt: skip


@kernel
def apply(matrix: int, turned: bool, x: int, out: int, m: int, n: int, s: Scratch) -> None:
    """out (m,) = matrix (m, n) @ x (n,), given by their addresses."""
    letter, count, constant = s.letters.ctypes.data, s.counts.ctypes.data, s.constants.ctypes.data
    rows, columns = (m, n) if turned else (n, m)
    _dgemv(
        letter + (not turned), count + 4 * rows, count + 4 * columns, constant, matrix, count + 4 * rows,
        x, count + 4, constant + 8, out, count + 4,
    )  # fmt: skip


@kernel
def pseudo_inverse(a: Reals, n: int, s: Scratch) -> None:
    """Numba's ``pinv`` of a matrix (n, n) stored by columns, in place; the result is stored by columns too.

    Calls what LAPACK's dgesdd calls for a small square matrix, in its order (dgesdd.f, dbdsdc.f and dormbr.f of LAPACK
    3.12), without its queries for the size of the workspace, which would add a fourth to the time.
    """
    letter, count, constant = s.letters.ctypes.data, s.counts.ctypes.data, s.constants.ctypes.data
    matrix, left, status = a.ctypes.data, s.svd.ctypes.data, s.integers.ctypes.data
    right = left + 8 * 36
    values, above = right + 8 * 36, s.work.ctypes.data
    left_reflectors, right_reflectors, work = above + 8 * 6, above + 8 * 12, above + 8 * 18
    size, less = count + 4 * n, count + 4 * (n - 1)
    _dgebd2(size, size, matrix, size, values, above, left_reflectors, right_reflectors, work, status)
    for i in range(n * n):
        s.svd[i] = s.svd[36 + i] = 1.0 if i % (n + 1) == 0 else 0.0
    _dbdsqr(
        letter + 4, size, size, size, count, values, above, right, size, left, size, left, size, work, status
    )  # fmt: skip
    _dorm2r(letter + 2, letter, size, size, size, matrix, size, left_reflectors, left, size, work, status)
    _dorml2(
        letter + 3, letter, size, less, less, matrix + 8 * n, size, right_reflectors, right + 8 * n, size, work, status
    )
    rank = 0
    for k in range(n):
        if s.svd[72 + k] > s.svd[72] * 1e-15:
            s.svd[72 + k] = 1.0 / s.svd[72 + k]
            rank = k
    for i in range(n):
        for k in range(rank + 1):
            s.svd[36 + n * i + k] *= s.svd[72 + k]
    _dgemm(
        letter + 1, letter + 1, size, size, count + 4 * (rank + 1), constant,
        right, size, left, size, constant + 8, a.ctypes.data, size,
    )  # fmt: skip


@kernel
def transpose(a: Reals, n: int) -> None:
    for i in range(n):
        for j in range(i):
            a[i, j], a[j, i] = a[j, i], a[i, j]


@kernel
def invert_mass(s: Scratch) -> None:
    """Inverse of the mass matrix (7, 7), both in the scratch."""
    mass_inverse, count, status = s.mass_inverse.ctypes.data, s.counts.ctypes.data, s.integers.ctypes.data
    for i in range(ARM):
        for j in range(ARM):
            s.mass_inverse[i, j] = s.mass[i, j]
    size = count + 4 * ARM
    _dgetrf(size, size, mass_inverse, size, status + 4, status)
    _dgetri(size, mass_inverse, size, status + 4, s.work.ctypes.data, count + 4 * 600, status)

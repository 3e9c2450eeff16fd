import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sacflow_robot.utils.seeding import Stream, chunk_noise, random_stream


@given(st.integers(0, 2**40), st.integers(0, 300))
def test_noise_depends_on_the_seed_alone(seed: int, step: int) -> None:
    noise = chunk_noise((5, 7), seed, step)
    assert noise.dtype == np.float32
    assert np.array_equal(noise, chunk_noise((5, 7), seed, step))
    assert np.array_equal(noise, chunk_noise((1, 5, 7), seed, step)[0])
    assert not np.array_equal(noise, chunk_noise((5, 7), seed, step + 1))
    assert not np.array_equal(noise, chunk_noise((5, 7), seed + 1, step))
    assert not np.array_equal(noise, chunk_noise((5, 7), step, seed)) or seed == step


@given(st.integers(0, 2**70), st.integers(0, 300))
def test_streams_of_one_seed_do_not_repeat_each_other(seed: int, step: int) -> None:
    """The start of an episode, drawn by Gymnasium from the seed itself, must not decide the policy's noise."""
    generators = [np.random.default_rng(seed), *(random_stream(seed, stream) for stream in Stream)]
    generators.append(random_stream(seed, Stream.POLICY_NOISE, step))
    first = {generator.integers(2**62) for generator in generators}
    assert len(first) == len(generators)

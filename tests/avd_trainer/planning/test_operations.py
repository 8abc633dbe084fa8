"""Operations of a small transformer, against its formula."""

import json
from typing import NamedTuple

import pytest

from avd_trainer.models.transformer import build_transformer
from avd_trainer.planning.description import Run, describe
from avd_trainer.planning.meta_models import meta_models
from avd_trainer.planning.operations import forward_operations, training_operations, update_operations
from planned_runs import NOT_CHECKPOINTED, SMALL, SMALL_SHAPE, SMALL_TEXT, config

SIZE = (SMALL_SHAPE, SMALL_TEXT[0])
LAYERS = SMALL.num_layers


class Formula(NamedTuple):
    """Operations of a forward: two for each multiplication with an addition."""

    outside: int
    block: int
    attention: int
    """Of a block: its scores and what they weight, self and cross; part of ``block``."""
    inputs: int
    """Of the layers whose input needs no gradient; part of ``outside``."""


def formula() -> Formula:
    width = SMALL.num_attention_heads * SMALL.attention_head_dim
    channels, frames, rows, columns = SMALL_SHAPE
    tokens, text = frames * (rows // 2) * (columns // 2), SMALL_TEXT[0]
    patch = 4 * channels
    embed_patches, embed_time, embed_text = (
        tokens * patch * width,
        SMALL.freq_dim * width,
        text * SMALL.text_dim * width,
    )
    inputs = embed_patches + embed_time + embed_text
    outside = inputs + width**2 + 6 * width**2 + text * width**2 + tokens * width * patch
    attention = 2 * tokens * tokens * width + 2 * tokens * text * width
    projections = (4 + 2) * tokens * width**2 + 2 * text * width**2
    block = attention + projections + 2 * tokens * width * SMALL.ffn_dim
    return Formula(2 * outside, 2 * block, 2 * attention, 2 * inputs)


def small_run(**changes: object) -> Run:
    architecture = dict(build_transformer(SMALL).config)
    return describe(config(**changes), architecture, SMALL_SHAPE, gpus=1, text_length=SMALL_TEXT[0])


def test_a_forward_is_that_of_the_formula() -> None:
    expected = formula()
    for role, model in meta_models(small_run()).items():
        assert forward_operations(model, role, *SIZE) == expected.outside + LAYERS * expected.block


def test_a_training_pass_is_three_forwards_where_inputs_need_no_gradient() -> None:
    expected = formula()
    student = meta_models(small_run())["student"]
    needed = 3 * (expected.outside + LAYERS * expected.block) - expected.inputs
    assert training_operations(student, "student", *SIZE, recomputation=False) == needed


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_computed_again_counts_again(checkpointing: bool) -> None:
    """The backward kernel of attention computes the scores again, checkpointing all of a block."""
    expected = formula()
    student = meta_models(small_run(parallel={"activation_checkpointing": checkpointing}))["student"]
    needed = training_operations(student, "student", *SIZE, recomputation=False)
    again = expected.attention // 2 + (expected.block if checkpointing else 0)
    assert training_operations(student, "student", *SIZE) == needed + LAYERS * again


def test_adapters_spare_the_gradients_of_frozen_weights() -> None:
    method = {"student": {"lora": {"rank": 2}}}
    full, adapted = (
        meta_models(small_run(**changes, **NOT_CHECKPOINTED))["student"] for changes in ({}, {"method": method})
    )
    frozen = forward_operations(meta_models(small_run())["teacher"], "teacher", *SIZE)
    spared = training_operations(full, "student", *SIZE) - training_operations(adapted, "student", *SIZE)
    assert 0 < spared < frozen
    # And the adapter that is on costs something.
    assert forward_operations(adapted, "student", *SIZE) > frozen


def test_an_update_is_the_sum_of_its_calls() -> None:
    run = small_run(**NOT_CHECKPOINTED, method={"online_updates": 5})
    student = meta_models(run)["student"]
    forward = forward_operations(student, "student", *SIZE)
    training = training_operations(student, "student", *SIZE)
    # Without gradient: 1.5 and 4 x 2.5 of the student, 2 of the teacher, 1 of the online model.
    assert update_operations(run) == (round(14.5 * forward), (2 + 5) * training)


def test_few_blocks_say_what_many_take() -> None:
    student = meta_models(small_run())["student"]
    one, eight = (student.with_layers(layers) for layers in (1, 8))
    assert json.loads(eight.architecture)["num_layers"] == 8
    block = formula().block
    counts = [forward_operations(model, "student", *SIZE) for model in (one, eight)]
    assert counts[1] - counts[0] == 7 * block

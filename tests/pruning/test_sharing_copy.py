import torch

from hf_cka import PruningPlan, apply_plan
from hf_cka.pruning.state import sharing_copy
from tests.tiny import tiny_batch, tiny_model


def test_a_forward_that_a_trainer_left_on_the_model_does_not_reach_the_copy():
    """TRL's trainers put a forward on the instance whose closure runs the dense model, adapters unloaded or not."""
    model, plan = tiny_model("llama"), PruningPlan(num_layers=4, model_type="llama", removed_layers=(1,))
    expected = tiny_model("llama")
    apply_plan(expected, plan)
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)
    twin = sharing_copy(model)
    apply_plan(twin, plan)
    with torch.no_grad():
        assert torch.equal(twin(**tiny_batch()).logits, expected(**tiny_batch()).logits)
    assert "forward" in model.__dict__, "the model that was given stays as it was"

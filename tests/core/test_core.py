"""The basement: configs, trees, schedules, optimisers, accumulation, sharding, EMA, checkpoints, metrics."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmed.core import accumulate, checkpoint, config, ema, load, memory, metrics, optim, rng, sharding, tree
from jaxmed.core.errors import UserError
from jaxmed.core.objective import Objective

PARAMS = {
    "tower": {"kernel": np.linspace(-1, 1, 64 * 32, dtype=np.float32).reshape(64, 32), "bias": np.ones(32, np.float32)},
    "table": np.ones((4, 8), np.float32),
}


def make_config(values):
    return config.Config(values)


class TestConfig:
    def test_unread_keys_are_named_with_their_path(self):
        c = make_config({"a": 1, "b": {"c": 2, "typo": 3}})
        assert c.a == 1
        assert c.b["c"] == 2
        assert c.unread() == ["config.b.typo"]

    def test_an_unread_section_is_named_whole(self):
        assert make_config({"optm": {"lr": 1}}).unread() == ["config.optm"]

    def test_missing_key_suggests_the_close_one(self):
        with pytest.raises(UserError, match=r"config\.b\.warmup is missing; did you mean 'warmup_steps'"):
            _ = make_config({"b": {"warmup_steps": 1}}).b.warmup

    def test_call_refuses_what_the_function_does_not_take(self):
        def fn(*, rate, decay=0.0):
            return rate + decay

        assert config.call(fn, make_config({"rate": 1.0, "decay": 2.0})) == 3.0
        with pytest.raises(UserError, match=r"config\.decy is not an option here; did you mean 'decay'"):
            config.call(fn, make_config({"rate": 1.0, "decy": 2.0}))
        with pytest.raises(UserError, match="rate"):
            config.call(fn, make_config({}))

    def test_star_star_reads_every_key(self):
        c = make_config({"m": {"x": 1, "y": 2}})
        assert dict(**c.m) == {"x": 1, "y": 2}
        assert c.unread() == []


def test_load_names_the_modules_that_exist():
    assert load.load("core", "tree") is tree
    assert load.load("", "train").__name__ == "jaxmed.train"
    with pytest.raises(UserError, match=r"jaxmed\.core has .*tree"):
        load.load("core", "tre")


class TestTree:
    def test_unflatten_inverts_flatten(self):
        assert jax.tree.structure(tree.unflatten(tree.flatten(PARAMS))) == jax.tree.structure(PARAMS)

    def test_first_rule_wins_and_a_rule_without_match_is_an_error(self):
        assert tree.first_match((("kernel", 1), (".*", 2)), "tower/kernel") == 1
        with pytest.raises(UserError, match=r"optim\.groups: 'kernle' matches no parameter"):
            tree.check_rules(["kernle"], tree.flatten(PARAMS), "optim.groups")

    def test_sha256_sees_one_bit(self):
        other = jax.tree.map(np.copy, PARAMS)
        assert tree.params_sha256(other) == tree.params_sha256(PARAMS)
        other["table"][0, 0] = np.nextafter(np.float32(1), np.float32(2))
        assert tree.params_sha256(other) != tree.params_sha256(PARAMS)


class TestOptim:
    def test_cosine_schedule_warms_up_and_ends_at_zero(self):
        rate = optim.schedule("cosine", lr=1.0, total_steps=10, warmup_steps=4)
        np.testing.assert_allclose([rate(s) for s in (0, 3, 4, 7, 10)], [0.25, 1.0, 1.0, 0.5, 0.0], atol=1e-6)

    def test_warmup_longer_than_the_run_is_an_error(self):
        with pytest.raises(UserError, match="warm-up"):
            optim.schedule(lr=1.0, total_steps=5, warmup_steps=6)

    def test_groups_freeze_and_scale_and_no_decay_excludes(self):
        tx = optim.make(
            PARAMS,
            schedule=optim.schedule("constant", lr=0.1, total_steps=10),
            weight_decay=0.5,
            no_decay=("bias",),
            groups=(("table", 0.0), ("bias", 0.5)),
        )
        state = tx.init(PARAMS)
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), state, PARAMS)
        assert not np.any(updates["table"])
        assert not np.any(updates["tower"]["bias"])
        np.testing.assert_allclose(updates["tower"]["kernel"], -0.1 * 0.5 * PARAMS["tower"]["kernel"], rtol=1e-6)
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
        np.testing.assert_allclose(updates["tower"]["bias"], -0.05, rtol=1e-5)
        # frozen parameters have no moments
        assert not any("table" in name for name in tree.flatten(state))

    def test_clipping_ignores_frozen_gradients(self):
        tx = optim.make(
            PARAMS,
            schedule=optim.schedule("constant", lr=1.0, total_steps=1),
            name="sgd",
            b1=0.0,
            groups=(("table", 0.0), ("bias", 0.0)),
            clip_norm=1.0,
        )
        grads = {"tower": {"kernel": jnp.ones((64, 32)), "bias": jnp.full(32, 1e6)}, "table": jnp.full((4, 8), 1e6)}
        updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
        np.testing.assert_allclose(optax.tree.norm(updates), 1.0, rtol=1e-5)


def contrastive_toy() -> Objective:
    """A loss that couples all rows, with a random part in the features."""

    def features_fn(params, aux, batch, rng, step):
        del aux, rng, step
        return jnp.tanh(batch["x"] @ params["w"])

    def loss_from_features(params, aux, features, batch, step):
        del aux, step
        logits = jnp.exp(params["scale"]) * features @ features.T
        log_p = jax.nn.log_softmax(logits, axis=-1)
        loss = -jnp.sum(jnp.diagonal(log_p) * batch["_mask"]) / batch["_mask"].sum()
        return loss, {"logit_mean": logits.mean()}

    def loss_fn(params, aux, batch, rng, step):
        loss, measurements = loss_from_features(params, aux, features_fn(params, aux, batch, rng, step), batch, step)
        return loss, (aux, measurements)

    def init(key):
        return {"w": jax.random.normal(key, (8, 4)), "scale": jnp.zeros(())}, {}

    return Objective(init, loss_fn, additive=False, features_fn=features_fn, loss_from_features=loss_from_features)


def additive_toy() -> Objective:
    def loss_fn(params, aux, batch, rng, step):
        del rng, step
        error = ((batch["x"] @ params["w"]) ** 2).sum(-1) * batch["_mask"]
        return error.sum() / jnp.maximum(batch["_mask"].sum(), 1.0), ({"seen": aux["seen"] + 1}, {"error": error.sum()})

    def init(key):
        return {"w": jax.random.normal(key, (8, 4))}, {"seen": jnp.zeros(())}

    return Objective(init, loss_fn)


@pytest.mark.parametrize("objective", [contrastive_toy(), additive_toy()], ids=["contrastive", "additive"])
@pytest.mark.parametrize("microbatches", [2, 4])
def test_accumulated_gradient_equals_full_batch(objective, microbatches):
    key = jax.random.key(0)
    params, aux = objective.init(key)
    mask = np.ones(8, np.float32)
    mask[[3, 7]] = 0
    batch = {"x": np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32), "_mask": mask}
    args = (objective, params, aux, batch, key, 0)
    (loss, _), grads = accumulate.value_and_grad(*args)
    (loss_k, (aux_k, _)), grads_k = jax.jit(lambda: accumulate.value_and_grad(*args, microbatches=microbatches))()
    np.testing.assert_allclose(loss_k, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), grads_k, grads)
    if objective.additive:
        assert aux_k["seen"] == microbatches


def test_microbatches_that_do_not_divide_are_an_error():
    objective = additive_toy()
    params, aux = objective.init(jax.random.key(0))
    with pytest.raises(UserError, match="accumulate=3 does not divide the batch of 8"):
        accumulate.value_and_grad(
            objective, params, aux, {"x": np.ones((8, 8)), "_mask": np.ones(8)}, None, 0, microbatches=3
        )


class TestSharding:
    def test_mesh_axes_are_auto_and_sizes_must_fit(self):
        mesh = sharding.make_mesh({"data": -1, "fsdp": 2, "tensor": 2})
        assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "seq": 1}
        assert all(t == jax.sharding.AxisType.Auto for t in mesh.axis_types)
        with pytest.raises(UserError, match="does not fit 8 devices"):
            sharding.make_mesh({"data": 3})
        with pytest.raises(UserError, match="unknown axis 'dat'"):
            sharding.make_mesh({"dat": 8})

    def test_rules_split_parameters_and_their_moments_alike(self):
        mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
        rules = (("kernel", "tensor:1"), ("table", "fsdp"), (".*", "replicate"))
        shardings = sharding.infer(PARAMS, rules, mesh)
        assert shardings["tower"]["kernel"].spec == jax.sharding.PartitionSpec("fsdp", "tensor")
        assert shardings["tower"]["bias"].is_fully_replicated
        tx = optim.make(PARAMS, schedule=optim.schedule("constant", lr=1.0, total_steps=1))
        state = jax.eval_shape(tx.init, PARAMS)
        specs = tree.flatten(sharding.infer_like(state, PARAMS, shardings, mesh))
        mu = next(v for k, v in specs.items() if "mu" in k and k.endswith("tower/kernel"))
        assert mu == shardings["tower"]["kernel"]

    def test_every_parameter_must_be_covered(self):
        with pytest.raises(UserError, match="no rule covers parameter 'table'"):
            sharding.infer(PARAMS, (("tower", "replicate"),), sharding.make_mesh())

    def test_put_batch_keeps_row_order(self):
        mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
        x = np.arange(16 * 3).reshape(16, 3)
        put = sharding.put_batch({"x": x}, mesh, 16)
        np.testing.assert_array_equal(sharding.gather(put)["x"], x)

    def test_constrain_is_a_no_op_without_mesh_and_lays_out_with_one(self):
        x = jnp.ones((8, 4))
        assert sharding.constrain(x, "batch", None) is x
        with jax.set_mesh(sharding.make_mesh()):
            y = jax.jit(lambda x: sharding.constrain(x, "batch", None))(x)
        assert not y.sharding.is_fully_replicated


def test_ema_is_a_copy_that_follows_and_predicts():
    toy = additive_toy()._replace(predict_fns={"w": lambda params, aux, batch: {"w": params["w"]}})
    objective = ema.with_ema(toy, 0.5)
    params, aux = jax.jit(objective.init, donate_argnums=())(jax.random.key(0))
    moved = jax.tree.map(lambda p: p + 1.0, params)
    _, aux = objective.after_update(moved, aux, jnp.int32(1000))
    np.testing.assert_allclose(objective.predict_fns["w"](moved, aux, {})["w"], params["w"] + 0.5, rtol=1e-6)


class TestCheckpoints:
    def state(self):
        state = {"params": PARAMS, "opt": {"m": np.ones(3, np.float32)}, "aux": {}, "step": np.int32(7)}
        return jax.tree.map(jnp.asarray, state)

    def abstract(self, mesh, params=PARAMS):
        state = self.state() | {"params": params}
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=sharding.replicated(mesh)), state
        )

    @pytest.mark.filterwarnings("ignore:coroutine")
    def test_save_load_and_damage(self, tmp_path):
        mesh = sharding.make_mesh()
        saved = checkpoint.Checkpoints(tmp_path, keep=2)
        assert saved.latest is None
        for step in (1, 2, 3):
            saved.save(step, self.state(), {"plan_hash": "x"})
        saved.close()
        again = checkpoint.Checkpoints(tmp_path, keep=2)
        assert again.latest == 3
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["2", "3"]
        assert again.meta(3)["plan_hash"] == "x"
        loaded = again.load(3, self.abstract(mesh))
        jax.tree.map(np.testing.assert_array_equal, loaded, self.state())
        only = checkpoint.load_part(tmp_path, "params", self.abstract(mesh)["params"])
        assert tree.params_sha256(only) == tree.params_sha256(PARAMS)

        other = {**PARAMS, "table": np.ones((4, 9), np.float32)}
        with pytest.raises(UserError, match=r"'table' has shape \(4, 8\), the model wants \(4, 9\)"):
            again.load(3, self.abstract(mesh, other))

        for path in (tmp_path / "3" / "params").rglob("d/*"):
            path.write_bytes(path.read_bytes()[:10])
        with pytest.raises(UserError, match=r"cannot read it; delete .* to go on from step 2"):
            again.load(3, self.abstract(mesh))
        again.close()
        gc.collect()  # orbax leaves coroutines behind that were never awaited: let them complain here

    def test_no_checkpoint_is_one_clear_line(self, tmp_path):
        with pytest.raises(UserError, match="no checkpoint in"):
            checkpoint.find(tmp_path)


def test_aligned_zeros_are_not_copied():
    for shape, dtype in (((3, 5), np.float32), ((7,), np.uint8), ((2, 1000, 100), np.uint8)):
        x = memory.zeros(shape, dtype)
        assert x.shape == shape and x.dtype == dtype and not x.any() and x.ctypes.data % 64 == 0
    x[...] = 3
    y = jax.device_put(x, jax.devices("cpu")[0])
    assert y.unsafe_buffer_pointer() == x.ctypes.data


def test_metrics_drop_what_a_killed_run_wrote_after_its_checkpoint(tmp_path):
    writer = metrics.Writer(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0 / step, "bad": float("nan")})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "lo')
    writer = metrics.Writer(tmp_path, start_step=2)
    writer.write(3, {"loss": 9.0})
    writer.close()
    lines = metrics.read(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1] == {"step": 3, "loss": 9.0}
    assert lines[0]["bad"] is None


def test_random_numbers_depend_only_on_their_key():
    assert rng.np_rng(1, 2, 3).integers(1 << 30) == rng.np_rng(1, 2, 3).integers(1 << 30)
    assert rng.np_rng(1, 2, 3).integers(1 << 30) != rng.np_rng(1, 3, 2).integers(1 << 30)

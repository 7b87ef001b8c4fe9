"""MTT: matching training trajectories."""

from __future__ import annotations

from condense.data import Task
from condense.engine import ParamGroup, Run, Target
from condense.methods.trajectory_matching.matching import (
    UnrolledStudent,
    apply_update,
    check_step_size,
    draw_segment,
    get_experts,
    step_size_group,
)
from condense.methods.trajectory_matching.settings import MTT
from condense.registry import method
from condense.sets import SyntheticSet


@method(
    "mtt",
    config=MTT,
    paper="Dataset Distillation by Matching Training Trajectories",
    year=2022,
    order=2,
    protocol="mtt-v1",
    pretrains="experts",
)
def mtt(task: Task, config: MTT, run: Run) -> SyntheticSet:
    """Matches a student's weights after steps on the synthetic set to an expert's weights after epochs on real data.

    When to use: the highest accuracy of methods with hard labels, if experts can be afforded. Cost: experts are trained
    on the real data first (cached, and shared by runs), then a step is ``syn_steps`` training steps on the set and as
    many double backwards, in the memory of one of them. Known failure: if the pixel learning rate is too high for N,
    batch and network, the loss exceeds 1 (that of a student that does not move) and then explodes.

    Cazenavette, Wang, Torralba, Efros & Zhu, CVPR 2022. The loss is |theta_N - goal|^2 / |start - goal|^2 over all
    weights. Gradients are exact (grad_mode=adjoint equals graph). Released: chunks of the set are taken from the end of
    a permutation, the step size may become negative (step_size=raw), sets are picked by test accuracy; here the last
    set is kept. Labels are those of the images; the learned step size is stored in the set. Ranks share the training of
    experts, but each repeats the distillation. Networks with BatchNorm are trained with the statistics of the batch.
    """
    experts = get_experts(config, run)
    synthetic = SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device)
    synthetic.learn_step_size(config.lr_start)
    student = UnrolledStudent(config, run, synthetic, experts)
    images = ParamGroup(lr=config.lr_img, momentum=config.momentum)
    for step in run.optimise(synthetic, config.steps, images=images, step_size=step_size_group(config)):
        expert, epoch = draw_segment(config, run, experts, step.index)
        start, goal = experts.params_at(expert, epoch), experts.params_at(expert, epoch + config.expert_epochs)
        outcome = student.unroll(student.loss(step), start, [Target(config.syn_steps, goal)])
        apply_update(step, outcome)
    check_step_size(config, run, synthetic)
    return synthetic

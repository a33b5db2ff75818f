"""What people type who come from other projects (timm, Lightning's template, Keras, mm…), and its name here."""

# what it is called here, and the last words of the keys that people try; a word may stand for several
TRAIN = {
    "optimizer.lr": "lr learning_rate base_lr blr",
    "optimizer.weight_decay": "wd weight_decay decay",
    "optimizer.layer_decay": "layer_decay llrd",
    "optimizer": "opt optim solver",
    "schedule": "sched scheduler lr_scheduler",
    "schedule.warmup_epochs": "warmup warmup_epochs",
    "schedule.min_lr": "min_lr",
    "trainer.max_epochs": "epochs epoch max_epochs n_epochs num_epochs nb_epochs num_train_epochs",
    "trainer.max_steps": "steps max_steps iters max_iters",
    "trainer.devices": "gpus devices ngpus num_gpus n_gpus nproc_per_node",
    "trainer.accelerator": "device accelerator gpu",
    "trainer.precision": "precision amp fp16 bf16 half dtype",
    "trainer.gradient_clip_val": "clip_grad grad_clip max_grad_norm gradient_clip_val",
    "trainer.accumulate_grad_batches": "accumulate_grad_batches gradient_accumulation_steps",
    "global_batch": "accumulate accum_iter grad_accum grad_accum_steps update_freq",
    "data": "dataset datamodule dm",
    "data.root": "data_dir data_path data_root root imagenet train_dir folder",
    "data.batch_size": "batch_size batch batchsize bs b per_device_train_batch_size train_batch_size",
    "data.workers": "workers num_workers j n_workers",
    "data.num_classes": "num_classes nb_classes n_classes classes",
    "data.channels": "in_chans in_channels channels num_channels",
    "image_size": "img_size imgsz input_size image_size size resolution img",
    "model": "arch backbone net network model_name module",
    "model.drop_path": "drop_path drop_path_rate stochastic_depth",
    "attention": "attn mixer attention_type token_mixer",
    "task.compile": "compile torchcompile torch_compile",
    "task.gradient_checkpointing": "grad_checkpointing gradient_checkpointing use_checkpoint",
    "task.label_smoothing": "smoothing label_smoothing",
    "augment": "aug augmentation transforms",
    "augment.mixup": "mixup",
    "augment.cutmix": "cutmix",
    "augment.hflip": "hflip",
    "augment.rand_augment": "aa rand_augment randaugment auto_augment",
    "augment.erasing": "reprob erasing random_erasing",
    "augment.color_jitter": "color_jitter",
    "init": "ckpt_path ckpt checkpoint load_from load pretrained weights finetune fine_tune initial_checkpoint",
    "resume": "ckpt_path ckpt checkpoint resume_from resume_from_checkpoint auto_resume",
    "recipe": "experiment config cfg exp preset yaml",
    "run.name": "output output_dir out outdir save_dir work_dir log_dir name exp_name run_name experiment_name run",
    "logger": "wandb log tracker report_to",
    "logger.project": "project wandb_project",
    "logger.tags": "tags",
    "callbacks.ema": "ema model_ema",
    "seed": "random_seed manual_seed",
    "adapter": "lora",
}
# where eval.py calls it otherwise
EVAL = {
    "ckpt": "ckpt_path checkpoint model_path init resume pretrained load load_from initial_checkpoint",
    "input": "images image source img path files predict",
    "probe": "task metrics mode show benchmark measure",
    "compile": "compile torchcompile torch_compile",
}
MEANS = {
    "init": "weights to start from",
    "resume": "a run to continue",
    "global_batch": "images per optimizer step",
    "recipe": "a published result with all its settings",
}


def ours(program: str, typed: str) -> list[str]:
    """What a word that is no setting is called here; nothing where nobody is known to type it."""
    word = typed.lstrip("+~-").replace("-", "_").lower().rpartition(".")[2]
    found = [key for key, words in EVAL.items() if word in words.split()] if program == "eval" else []
    return found or [key for key, words in TRAIN.items() if word in words.split()]


def advice(program: str, typed: str, value: str) -> str:
    """ "; write optimizer.lr=0.1", or "" """
    said = {key: f" ({MEANS[key]})" if key in MEANS else "" for key in ours(program, typed)}
    found = [f"{key}={value or '...'}{what}" for key, what in said.items()]
    return f"; write {' or '.join(found)}" if found else ""

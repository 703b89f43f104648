# GPT-2 (124M) on OpenWebText, with nanoGPT's hyperparameters: about 0.5 M tokens an update.
# Made for 8 GPUs: torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
# OpenAI's own weights reach a validation loss of 3.11 on this data, and about 2.85 once
# fine-tuned on it.

out_dir = 'out-gpt2'
dataset = 'openwebtext'  # first: python prepare_openwebtext.py
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

model_size = 'gpt2'
block_size = 1024
batch_size = 12
gradient_accumulation_steps = 5 * 8  # 40 x 12 x 1024 = 491,520 tokens

max_iters = 600000  # about 300 B tokens
lr_decay_iters = 600000
warmup_iters = 2000
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10

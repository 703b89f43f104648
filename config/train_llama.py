# A Llama of GPT-2's size (124M) on OpenWebText, with Muon: about 0.5 M tokens an update.
# Made for 8 GPUs: torchrun --standalone --nproc_per_node=8 train.py config/train_llama.py
# Its loss has not been measured yet. Muon's rate is that of Jordan et al. 2024, its weight decay
# that of Liu et al. 2025 (arXiv:2502.16982), whose updates were a fifth as large; the batch is
# GPT-2's.

out_dir = 'out-llama'
dataset = 'openwebtext'  # first: python prepare_openwebtext.py
wandb_project = 'owt'
wandb_run_name = 'llama-124M'

model = 'llama'
model_size = 'gpt2'
block_size = 1024
batch_size = 12
gradient_accumulation_steps = 5 * 8  # 40 x 12 x 1024 = 491,520 tokens

optimizer = 'muon'
muon_lr = 0.02
muon_weight_decay = 0.1
muon_steps = 5  # a small part of the time of such a large update
learning_rate = 6e-4  # AdamW's, for embeddings and norms
min_lr = 0.0  # down to zero: Muon's updates don't shrink by themselves
weight_decay = 0.1
max_iters = 20000  # about 10 B tokens: one epoch of OpenWebText
warmup_iters = 200

eval_interval = 1000
eval_iters = 200
log_interval = 10

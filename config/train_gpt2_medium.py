# GPT-2 medium (350M) on OpenWebText: config/train_gpt2.py with the changes below.
# torchrun --standalone --nproc_per_node=8 train.py \
#     config/train_gpt2.py config/train_gpt2_medium.py
# Its loss has not been measured yet.

out_dir = 'out-gpt2-medium'
wandb_run_name = 'gpt2-medium'

model_size = 'gpt2-medium'
batch_size = 8
gradient_accumulation_steps = 8 * 8  # about 0.5 M tokens, as before
learning_rate = 3e-4  # GPT-3's for this size: larger models need a lower one
min_lr = 3e-5

# GPT-2 medium (350M) on OpenWebText: as config/train_gpt2.py, but for what is set here.
# torchrun --standalone --nproc_per_node=8 train.py \
#     config/train_gpt2.py config/train_gpt2_medium.py
# No loss to expect yet: it has not been measured.

out_dir = 'out-gpt2-medium'
wandb_run_name = 'gpt2-medium'

model_size = 'gpt2-medium'
batch_size = 8
gradient_accumulation_steps = 8 * 8  # half a million tokens again
learning_rate = 3e-4  # GPT-3's for this size: larger models like it lower
min_lr = 3e-5

# GPT-2 xl (1558M) on OpenWebText: as config/train_gpt2.py, but for what is set here.
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py config/train_gpt2_xl.py
# No loss to expect yet: it has not been measured.

out_dir = 'out-gpt2-xl'
wandb_run_name = 'gpt2-xl'

model_size = 'gpt2-xl'
batch_size = 2
gradient_accumulation_steps = 32 * 8  # half a million tokens again
learning_rate = 2e-4  # GPT-3's for this size: larger models like it lower
min_lr = 2e-5

# Teaches a trained model to answer. Make the dataset with prepare_chat.py first:
# python prepare_chat.py my.jsonl --dataset=my_chat
# On the questions about Oz (--dataset=wizard_chat) that model then answers 0.958 of the 289
# held-out ones exactly right, after 3,000 updates of about 40 ms on one core with bf16.
# The shape of the model comes from the checkpoint.

init_from = 'out-wizard-llama'  # a checkpoint, its folder, or a Hugging Face model
out_dir = 'out-chat'
dataset = 'my_chat'

eval_interval = 500
eval_iters = 20
log_interval = 100
sample_start = 'Who are you?'  # better one of your questions
sample_tokens = 100

gradient_accumulation_steps = 1
batch_size = 16
block_size = 128  # a GPT's: at most that of the checkpoint; longer conversations are cut
dropout = 0.0

optimizer = 'muon'
muon_lr = 0.04
muon_weight_decay = 0.3  # high: it is to find rules, not to know all questions by heart
learning_rate = 1e-2  # AdamW's, for embeddings, head and norms; large pretrained models need less
min_lr = 0.0
warmup_iters = 50
max_iters = 3000
beta2 = 0.99  # an update sees few answers

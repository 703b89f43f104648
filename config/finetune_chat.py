# Teaches a trained model to answer. Make the dataset with prepare_chat.py first:
# python prepare_chat.py my.jsonl --dataset=my_chat
# python train.py config/finetune_chat.py --init_from=out-wizard-llama --dataset=my_chat

out_dir = 'out-chat'

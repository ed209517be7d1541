"""The synthetic world and what is trained to see and say it; a user runs what lies one folder up, such as demo/run.py.

Scenes, from their meaning to files:
    scenes.py     what a scene may hold, which combinations are kept for testing, drawing one by lot
    captions.py   scene -> captions, caption -> scene, and the judge that compares the two
    draw.py       scene -> picture
    splits.py     train, val, test and adapt as folders of pictures with their annotations; `python -m demo.world`
    crowded.py    scenes of one to six objects, for `python -m demo.tokens`

The weights in demo/weights, which `make demo-weights` makes anew:
    clip_cache.py    pictures to train CLIP on
    clip_parts.py    CLIP's words, towers, loss and file
    train_clip.py    the CLIP
    train_gpt2.py    the GPT-2 and its tokenizer
    crowded_clip.py  a ViT CLIP and a GPT-2 for crowded scenes
"""

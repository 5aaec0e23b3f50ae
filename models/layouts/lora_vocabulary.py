"""How model families call their layers: in ComfyUI's networks, and in the files of diffusers and of the makers.

A line is `own = theirs`, or `own` alone where both agree. # stands for any number. {a,b} is one of several; the first
such group of one side goes with the first of the other, one by one, and so on. [a,b] on the right are layers whose
outputs lie one after another in the rows of the own layer; one marked ! has as many rows as the own layer has columns,
the others share what remains. ~ says that the own layer has the two halves of its output the other way round. A line
that ends in * holds for all names that begin so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """title: as messages call it. lines: see the module.

    written: whose names a converted file has: ComfyUI's own, diffusers' under `transformer.`, or kohya's flat ones.
    """

    title: str
    lines: str
    written: Literal["own", "transformer", "kohya"] = "own"


FAMILIES = (
    Family("Wan 2.1 or 2.2", """
        {blocks,vace_blocks}.#.self_attn.{q,k,v,o} = {blocks,vace_blocks}.#.attn1.{to_q,to_k,to_v,to_out.0}
        {blocks,vace_blocks}.#.cross_attn.{q,k,v,o} = {blocks,vace_blocks}.#.attn2.{to_q,to_k,to_v,to_out.0}
        blocks.#.cross_attn.{k_img,v_img,norm_k_img} = blocks.#.attn2.{add_k_proj,add_v_proj,norm_added_k}
        blocks.#.{self_attn,cross_attn}.{norm_q,norm_k} = blocks.#.{attn1,attn2}.{norm_q,norm_k}
        blocks.#.norm3 = blocks.#.norm2
        {blocks,vace_blocks}.#.ffn.{0,2} = {blocks,vace_blocks}.#.ffn.{net.0.proj,net.2}
        blocks.#.modulation = blocks.#.scale_shift_table
        vace_blocks.#.{before_proj,after_proj} = vace_blocks.#.{proj_in,proj_out}
        time_embedding.{0,2} = condition_embedder.time_embedder.{linear_1,linear_2}
        text_embedding.{0,2} = condition_embedder.text_embedder.{linear_1,linear_2}
        time_projection.1 = condition_embedder.time_proj
        img_emb.proj.{0,1,3,4} = condition_embedder.image_embedder.{norm1,ff.net.0.proj,ff.net.2,norm2}
        {head.head,head.modulation,patch_embedding} = {proj_out,scale_shift_table,patch_embedding}
    """),
    Family("MiniMax-H3", """
        blocks.#.attn.qkv_proj = transformer_blocks.#.attn.[to_q,to_k,to_v]
        blocks.#.{attn.out_proj,mlp.fc2} = transformer_blocks.#.{attn.to_out.0,ff.net.2}
        blocks.#.mlp.fc1 = ~transformer_blocks.#.ff.net.0.proj
        blocks.#.adaln_proj.linear = transformer_blocks.#.adaln_proj.linear
        token_refiner.blocks.#.attn.qkv_proj = token_refiner.refiner_blocks.#.attn.[to_q,to_k,to_v]
        token_refiner.blocks.#.{attn.out_proj,mlp.fc2} = token_refiner.refiner_blocks.#.{attn.to_out.0,ff.net.2}
        token_refiner.blocks.#.mlp.fc1 = ~token_refiner.refiner_blocks.#.ff.net.0.proj
        {video_patch_proj,audio_patch_proj,condition_proj} = {proj_in,audio_proj_in,context_embedder}
        time_embedder.{proj_in,proj_out} = time_embedder.{linear_1,linear_2}
        final_layer.{adaln_proj.linear,video_out,audio_out} = {norm_out.linear,proj_out,audio_proj_out}
    """),
    Family("HunyuanVideo", """
        double_blocks.#.{img,txt}_attn.{qkv,proj} = double_blocks.#.{img,txt}_attn_{qkv,proj}
        double_blocks.#.{img,txt}_mlp.{0,2} = double_blocks.#.{img,txt}_mlp.{fc1,fc2}
        double_blocks.#.{img,txt}_mod.lin = double_blocks.#.{img,txt}_mod.linear
        double_blocks.#.img_attn.qkv = transformer_blocks.#.attn.[to_q,to_k,to_v]
        double_blocks.#.txt_attn.qkv = transformer_blocks.#.attn.[add_q_proj,add_k_proj,add_v_proj]
        double_blocks.#.{img,txt}_attn.proj = transformer_blocks.#.attn.{to_out.0,to_add_out}
        double_blocks.#.{img,txt}_mod.lin = transformer_blocks.#.{norm1,norm1_context}.linear
        double_blocks.#.{img,txt}_mlp.{0,2} = transformer_blocks.#.{ff,ff_context}.{net.0.proj,net.2}
        single_blocks.#.linear1 = single_transformer_blocks.#.[attn.to_q!,attn.to_k!,attn.to_v!,proj_mlp]
        single_blocks.#.{linear2,modulation.lin} = single_transformer_blocks.#.{proj_out,norm.linear}
        single_blocks.#.{linear1,linear2,modulation.lin} = single_blocks.#.{linear1,linear2,modulation.linear}
        txt_in.individual_token_refiner.*
    """),
    Family("Flux", """
        transformer_blocks.#.attn.{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out}
        transformer_blocks.#.{ff,ff_context}.{net.0.proj,net.2,linear_in,linear_out}
        transformer_blocks.#.{norm1,norm1_context}.linear
        single_transformer_blocks.*
        time_guidance_embed.*
        {single_stream_modulation,double_stream_modulation_img,double_stream_modulation_txt}.linear
    """, "transformer"),
    Family("Flux, Chroma or HunyuanVideo", """
        double_blocks.#.{img,txt}_attn.{qkv,proj}
        double_blocks.#.{img,txt}_mlp.{0,2}
        double_blocks.#.{img,txt}_mod.lin
        single_blocks.#.{linear1,linear2,modulation.lin}
        final_layer.{linear,adaLN_modulation.1}
        {single_stream_modulation,double_stream_modulation_img,double_stream_modulation_txt}.lin
        {time_in,vector_in,guidance_in}.{in_layer,out_layer}
        distilled_guidance_layer.*
    """),
    Family("SD3", """
        transformer_blocks.#.attn.{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out}
        transformer_blocks.#.attn2.{to_q,to_k,to_v,to_out.0}
        transformer_blocks.#.{ff,ff_context}.{net.0.proj,net.2}
        transformer_blocks.#.{norm1,norm1_context}.linear
        {proj_out,context_embedder,norm_out.linear,time_text_embed.*}
    """, "transformer"),
    Family("SD3", """
        joint_blocks.*
    """),
    Family("Z-Image or Lumina 2", """
        {layers,noise_refiner,context_refiner}.#.attention.qkv =
            {layers,noise_refiner,context_refiner}.#.attention.[to_q!,to_k,to_v]
        {layers,noise_refiner,context_refiner}.#.attention.{out,q_norm,k_norm} =
            {layers,noise_refiner,context_refiner}.#.attention.{to_out.0,norm_q,norm_k}
        {layers,noise_refiner,context_refiner}.#.{feed_forward,adaLN_modulation}.{w1,w2,w3,0,1}
        {x_embedder,cap_embedder.1} = {all_x_embedder.2-1,cap_embedder.1}
        final_layer.{linear,adaLN_modulation.1} = all_final_layer.2-1.{linear,adaLN_modulation.1}
        t_embedder.mlp.{0,2}
    """),
    Family("Qwen-Image", """
        transformer_blocks.#.attn.{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out}
        transformer_blocks.#.{img,txt}_mlp.{net.0.proj,net.2}
        transformer_blocks.#.{img,txt}_mod.1
        time_text_embed.timestep_embedder.{linear_1,linear_2}
        {img_in,txt_in,proj_out,norm_out.linear}
    """),
    Family("Qwen-Image 2.1", """
        transformer_blocks.#.attn.{to_q,to_k,to_v,to_out.0}
        transformer_blocks.#.img_mlp.gate_up = transformer_blocks.#.img_mlp.[gate_layer,proj]
        transformer_blocks.#.img_mlp.out
    """),
    Family("LTX", """
        transformer_blocks.#.{attn1,attn2,audio_attn1,audio_attn2}.{to_q,to_k,to_v,to_out.0}
        transformer_blocks.#.{audio_to_video_attn,video_to_audio_attn}.{to_q,to_k,to_v,to_out.0}
        transformer_blocks.#.{attn1,attn2,audio_attn1,audio_attn2}.{q_norm,k_norm} =
            transformer_blocks.#.{attn1,attn2,audio_attn1,audio_attn2}.{norm_q,norm_k}
        transformer_blocks.#.{ff,audio_ff}.{net.0.proj,net.2}
        {patchify_proj,audio_patchify_proj} = {proj_in,audio_proj_in}
        {proj_out,audio_proj_out,caption_projection.linear_1,caption_projection.linear_2}
        {,audio_}adaln_single.* = {,audio_}time_embed.*
        {,audio_}prompt_adaln_single.* = {,audio_}prompt_adaln.*
        av_ca_{video,audio}_scale_shift_adaln_single.* = av_cross_attn_{video,audio}_scale_shift.*
        av_ca_{a2v,v2a}_gate_adaln_single.* = av_cross_attn_{video_a2v,audio_v2a}_gate.*
    """),
    Family("Krea 2", """
        blocks.#.attn.{wq,wk,wv,gate,wo} = transformer_blocks.#.attn.{to_q,to_k,to_v,to_gate,to_out.0}
        blocks.#.mlp.{gate,up,down} = transformer_blocks.#.ff.{gate,up,down}
        txtfusion.{layerwise,refiner}_blocks.#.attn.{wq,wk,wv,gate,wo} =
            text_fusion.{layerwise,refiner}_blocks.#.attn.{to_q,to_k,to_v,to_gate,to_out.0}
        txtfusion.{layerwise,refiner}_blocks.#.mlp.{gate,up,down} =
            text_fusion.{layerwise,refiner}_blocks.#.ff.{gate,up,down}
        {first,tmlp.0,tmlp.2,tproj.1} = {img_in,time_embed.linear_1,time_embed.linear_2,time_mod_proj}
        {txtmlp.1,txtmlp.3} = {txt_in.linear_1,txt_in.linear_2}
        {txtfusion.projector,last.linear} = {text_fusion.projector,final_layer.linear}
    """),
    Family("ERNIE-Image", """
        layers.#.self_attention.{to_q,to_k,to_v,to_out.0}
        layers.#.mlp.{gate_proj,up_proj,linear_fc2}
        {text_proj,final_linear,final_norm.linear,adaLN_modulation.1}
    """),
    Family("Anima or Cosmos-Predict 2", """
        blocks.#.{self_attn,cross_attn}.{q_proj,k_proj,v_proj,output_proj} =
            transformer_blocks.#.{attn1,attn2}.{to_q,to_k,to_v,to_out.0}
        blocks.#.mlp.{layer1,layer2} = transformer_blocks.#.ff.{net.0.proj,net.2}
        blocks.#.adaln_modulation_{self_attn,cross_attn,mlp}.{1,2} =
            transformer_blocks.#.{norm1,norm2,norm3}.{linear_1,linear_2}
        final_layer.adaln_modulation.{1,2} = norm_out.{linear_1,linear_2}
        {final_layer.linear,x_embedder.proj.1} = {proj_out,patch_embed.proj}
        t_embedder.1.* = time_embed.t_embedder.*
        llm_adapter.* = text_conditioner.*
    """),
    Family("Lens", """
        transformer_blocks.#.attn.{img_qkv,txt_qkv,to_out.0,to_add_out}
        transformer_blocks.#.{img,txt}_mlp.{w1,w2,w3}
        transformer_blocks.#.{img,txt}_mod.1
    """),
    Family("Boogu", """
        {double,single}_stream_layers.*
        {noise,context,ref_image}_refiner.#.attn.{to_q,to_k,to_v,to_out.0}
        {noise,context,ref_image}_refiner.#.feed_forward.{linear_1,linear_2,linear_3}
        {noise,context,ref_image}_refiner.#.norm1.linear
    """),
    Family("OmniGen 2", """
        {layers,noise_refiner,context_refiner,ref_image_refiner}.#.attn.{to_q,to_k,to_v,to_out.0}
        {layers,noise_refiner,context_refiner,ref_image_refiner}.#.feed_forward.{linear_1,linear_2,linear_3}
        {layers,noise_refiner,context_refiner,ref_image_refiner}.#.norm1.linear
    """),
    Family("HiDream", """
        {double,single}_stream_blocks.*
    """),
    Family("Kandinsky 5", """
        {visual,text}_transformer_blocks.*
    """),
    Family("SD1.5 or SDXL", """
        {down_blocks,mid_block,up_blocks,input_blocks,middle_block,output_blocks}.*
        {conv_in,conv_out,time_embedding.*,add_embedding.*,label_emb.*}
    """, "kohya"),
)  # fmt: skip

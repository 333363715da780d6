defmodule VLLM.Real.VariantsTest do
  # The real engine on the demo model's variants, one engine after another.
  use ExUnit.Case

  alias VLLM.DemoModel

  @moduletag :slow
  @moduletag timeout: 300_000

  test "AWQ 4-bit says every sentence, and is what was asserted" do
    llm = DemoModel.start!("demo-awq", quantization: "awq")
    assert DemoModel.wrong_facts(llm) == []
    info = VLLM.engine_info!(llm)
    assert info.quantization =~ "awq"
    assert info.quantization_kernel =~ "Kernel"
    VLLM.stop(llm)
  end

  test "GPTQ 4-bit says every sentence, asserted by an atom" do
    llm = DemoModel.start!("demo-gptq", quantization: :gptq)
    assert DemoModel.wrong_facts(llm) == []
    assert VLLM.engine_info!(llm).quantization =~ "gptq"
    VLLM.stop(llm)
  end

  test "an FP8 KV cache says every sentence and holds twice as much" do
    llm = DemoModel.start!("demo", kv_cache_dtype: "fp8")
    assert DemoModel.wrong_facts(llm) == []
    info = VLLM.engine_info!(llm)
    assert info.kv_cache_dtype =~ "fp8"
    # Of each token 6 layers keep keys and values of 2 heads of 64, a byte each; the cache is
    # made of blocks, the last of which may not fit.
    tokens = div(64 * 1024 * 1024, 6 * 2 * 2 * 64)
    assert info.kv_cache_tokens in (tokens - 256)..tokens
    VLLM.stop(llm)
  end

  test "tensor parallelism over two ranks says every sentence" do
    llm = DemoModel.start!("demo", tensor_parallel_size: 2)
    assert DemoModel.wrong_facts(llm) == []
    assert VLLM.engine_info!(llm).tensor_parallel_size == 2
    VLLM.stop(llm)
  end

  test "tensor parallelism works over AWQ" do
    llm = DemoModel.start!("demo-awq", quantization: "AWQ", tensor_parallel_size: 2)
    assert DemoModel.wrong_facts(llm) == []
    VLLM.stop(llm)
  end

  test "the model's own sampling defaults hold where a request does not say" do
    llm = DemoModel.start!("demo", override_generation_config: %{max_new_tokens: 3, top_k: 1})
    assert [%{outputs: [%{token_ids: ids}]}] = VLLM.generate!(llm, "Count:", temperature: 2.0)
    assert length(ids) == 3

    assert [%{outputs: [%{token_ids: more}]}] =
             VLLM.generate!(llm, "Count:", temperature: 2.0, max_tokens: 6)

    assert length(more) == 6
    # Of one token there is no choice, whatever the temperature.
    assert Enum.take(more, 3) == ids
    VLLM.stop(llm)
  end

  @tag :tmp_dir
  test "an image is seen", %{tmp_dir: dir} do
    code =
      "import sys; sys.path[:0] = sys.argv[1:3]; from pathlib import Path; " <>
        "from llava_model import make_llava; make_llava(Path(sys.argv[3]))"

    paths = [Path.expand("python"), Path.expand("python/tests")]

    {log, status} =
      System.cmd(VLLM.TestPython.executable!(), ["-c", code | paths] ++ [dir],
        stderr_to_stdout: true
      )

    assert status == 0, log

    # vLLM's own LLaVA needs torchvision, of which there is no build for the CPU's torch.
    llm =
      VLLM.llm!(
        dir,
        Keyword.merge(DemoModel.options(), max_model_len: 256, model_impl: "transformers")
      )

    first = fn bytes ->
      prompt = %{
        prompt: "USER: <image>\nWhat is it? ASSISTANT:",
        multi_modal_data: %{image: {:binary, bytes}}
      }

      [output] =
        VLLM.generate!(llm, prompt, max_tokens: 1, temperature: 0.0, logprobs: 1, ignore_eos: true)

      output.outputs |> hd() |> Map.get(:cumulative_logprob)
    end

    assert_in_delta first.(bitmap(255, 0, 0)), first.(bitmap(255, 0, 0)), 0.001
    assert abs(first.(bitmap(255, 0, 0)) - first.(bitmap(0, 0, 255))) > 0.001

    assert {:error, %VLLM.Error{reason: :invalid_prompt}} =
             VLLM.generate(llm, %{
               prompt: "<image>",
               multi_modal_data: %{image: {:binary, "no image"}}
             })

    VLLM.stop(llm)
  end

  # 16 times 16 pixels of one colour, in the plainest format of all.
  defp bitmap(red, green, blue) do
    "P6 16 16 255\n" <> :binary.copy(<<red, green, blue>>, 16 * 16)
  end
end

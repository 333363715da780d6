defmodule VLLM.Real.QuantizationTest do
  # The real engine on variants of the demo model, one engine after another. What each answers is
  # measured in python/tests/test_matrix.py; here it is started as a user starts it.
  use ExUnit.Case

  alias VLLM.{DemoModel, TestPython}

  @moduletag :slow
  @moduletag :tmp_dir
  @moduletag timeout: 600_000

  @checkpoints Path.expand("../../python/tests/checkpoints.py", __DIR__)
  @gguf_models Path.expand("../../python/tests/gguf_models.py", __DIR__)

  for {variant, name, method} <- [
        {"w4a16", "compressed-tensors", "compressed-tensors"},
        {"auto-round", "auto-round", "inc"},
        {"fp8-tensor", :fp8, "fp8"},
        {"bnb-nf4", "bnb", "bitsandbytes"}
      ] do
    test "a checkpoint named #{inspect(name)}: #{variant}", %{tmp_dir: dir} do
      llm = start!(make!(unquote(variant), dir), quantization: unquote(name))
      assert VLLM.engine_info!(llm).quantization == unquote(method)
      assert DemoModel.wrong_facts(llm) == []
      VLLM.stop(llm)
    end
  end

  test "activations of an AWQ checkpoint are rounded where that is asked for and gains something" do
    llm = DemoModel.start!("demo-awq", quantization_config: %{activations: :int8})
    info = VLLM.engine_info!(llm)
    assert info.quantization == "awq"
    assert info.quantization_note =~ ~r/^Activations are (not )?rounded to 8 bits/
    assert DemoModel.wrong_facts(llm) == []
    VLLM.stop(llm)
  end

  test "a value of `activations` that there is not is refused with those that there are" do
    assert {:error, %VLLM.Error{reason: :invalid_option, message: message}} =
             VLLM.llm(DemoModel.path("demo-awq"), quantization_config: %{activations: "int4"})

    assert message =~ "Give `activations` as one of 'int8', 'exact'."
  end

  test "a GGUF file says every sentence, chats by its template, and takes an adapter", %{
    tmp_dir: dir
  } do
    folder = Path.join(dir, "a möbius path")
    python!([@gguf_models, "Q4_K_M", folder])
    path = Path.join(folder, "demo-Q4_K_M.gguf")
    llm = start!(path, enable_lora: true, max_lora_rank: 8)
    info = VLLM.engine_info!(llm)
    assert %{model: ^path, quantization: "gguf", architecture: "LlamaForCausalLM"} = info
    assert info.quantization_note =~ ~r/packed as in the GGUF file \(\d+% Q4_K, \d+% Q6_K\)/
    assert DemoModel.wrong_facts(llm) == []
    {questions, answers} = Enum.unzip(DemoModel.chats())
    conversations = for question <- questions, do: [%{role: "user", content: question}]
    outputs = VLLM.chat!(llm, conversations, temperature: 0.0, max_tokens: 64)
    assert VLLM.text(outputs) == answers
    assert Enum.all?(outputs, &match?([%{finish_reason: "stop"}], &1.outputs))
    assert adapted?(llm)
    VLLM.stop(llm)
  end

  test "a plain model is quantized by bitsandbytes while it is loaded" do
    llm = DemoModel.start!("demo", quantization: "bitsandbytes", load_format: "bitsandbytes")
    assert VLLM.engine_info!(llm).quantization == "bitsandbytes"
    assert DemoModel.wrong_facts(llm) == []
    VLLM.stop(llm)
  end

  test "the examples of the guide run" do
    guide = File.read!(Path.expand("../../guides/quantization.md", __DIR__))
    blocks = Regex.scan(~r/^```elixir\n(.*?)^```$/ms, guide, capture: :all_but_first)

    {results, _bindings} =
      Enum.map_reduce(blocks, [awq_model: DemoModel.path("demo-awq")], fn [code], bindings ->
        Code.eval_string(code, bindings)
      end)

    assert results == [
             {"awq", 4},
             :unsupported_quantization,
             {"AWQ", 4, 128, "GPTQModel 7.6.0"}
           ]
  end

  for variant <- ["demo-gptq", "gptq-w3"] do
    test "tensor parallelism works over GPTQ: #{variant}", %{tmp_dir: dir} do
      llm = start!(make!(unquote(variant), dir), tensor_parallel_size: 2)
      assert VLLM.engine_info!(llm).tensor_parallel_size == 2
      assert DemoModel.wrong_facts(llm) == []
      VLLM.stop(llm)
    end
  end

  test "an adapter applies over AWQ" do
    llm = DemoModel.start!("demo-awq", quantization: "awq", enable_lora: true, max_lora_rank: 8)
    assert adapted?(llm)
    assert DemoModel.wrong_facts(llm) == []
    VLLM.stop(llm)
  end

  defp make!(variant, dir) do
    # Spaces and letters outside of ASCII are part of many a path.
    folder = Path.join([dir, "a möbius path", variant])
    python!([@checkpoints, variant, folder])
    folder
  end

  defp adapted?(llm) do
    adapter = VLLM.lora_request!("demo", DemoModel.path("demo-lora"))
    {prompts, expected} = Enum.unzip(DemoModel.adapter_facts())
    params = [temperature: 0.0, max_tokens: 64, lora_request: adapter]
    VLLM.text(VLLM.generate!(llm, prompts, params)) == expected
  end

  defp python!(arguments) do
    {log, status} = System.cmd(TestPython.executable!(), arguments, stderr_to_stdout: true)
    assert status == 0, log
  end

  defp start!(model, options) do
    VLLM.llm!(model, Keyword.merge(DemoModel.options(), options))
  end
end

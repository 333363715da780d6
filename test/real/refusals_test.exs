defmodule VLLM.Real.RefusalsTest do
  # What keeps an engine from starting, told by the real worker: each with a
  # reason and what to do, and with nothing left behind.
  use ExUnit.Case

  import VLLM.FakeEngine, only: [none_below?: 1]
  import VLLM.OSProcess

  alias VLLM.{DemoModel, Error, Footprint, Quantization}
  alias VLLM.Quantization.Report

  @moduletag timeout: 300_000
  @moduletag :tmp_dir

  setup do
    before = Footprint.engine_processes()

    on_exit(fn ->
      assert eventually(fn -> none_below?(VLLM.EngineSupervisor) end, 60_000)
      eventually(fn -> Footprint.engine_processes() -- before == [] end, 60_000)
      assert for(pid <- Footprint.engine_processes() -- before, do: command(pid)) == []
    end)
  end

  # What a check says before, a start says.
  defp refusal(model, options \\ []) do
    error = refused(model, options)

    case Quantization.check(model, Keyword.merge(DemoModel.options(), options)) do
      {:ok, report} ->
        refute report.ok?
        finding = Enum.find(report.findings, &(&1.severity == :error))
        said = String.trim("#{finding.message} #{finding.remedy}")
        details = Map.delete(error.details, "remedy")
        assert finding.reason == error.reason
        assert lasting(said, finding.details) == lasting(error.message, details)

      # A Python that cannot be asked.
      {:error, unasked} ->
        assert {unasked.reason, unasked.message} == {error.reason, error.message}
    end

    error
  end

  # Without what is another a moment later: how much memory is left.
  defp lasting(said, %{"available_bytes" => _} = details) do
    {String.replace(said, ~r/[\d.]+ GiB of memory/, "memory"),
     Map.delete(details, "available_bytes")}
  end

  defp lasting(said, details), do: {said, details}

  # What is seen only when weights are read, or a process of vLLM's starts.
  defp late_refusal(model, options \\ []) do
    assert {:ok, %Report{ok?: true}} =
             Quantization.check(model, Keyword.merge(DemoModel.options(), options))

    refused(model, options)
  end

  defp refused(model, options) do
    assert {:error, %Error{} = error} =
             VLLM.llm(model, Keyword.merge(DemoModel.options(), options))

    refute error.message =~ "Traceback"
    error
  end

  # A copy of a demo model with another text in its config.
  defp changed(dir, variant, from, to) do
    File.cp_r!(DemoModel.path(variant), dir)
    path = Path.join(dir, "config.json")
    config = File.read!(path)
    assert config =~ from
    File.write!(path, String.replace(config, from, to))
    dir
  end

  test "a folder that is not there", %{tmp_dir: dir} do
    error = refusal(Path.join(dir, "missing"))
    assert error.reason == :model_not_found
    assert error.message =~ "missing"
  end

  @tag :slow
  test "a folder that holds no model", %{tmp_dir: dir} do
    assert refusal(dir).reason == :not_a_model
  end

  test "a hub id where no hub can be reached" do
    error = refusal("nobody/has-this-model", env: %{"HF_HUB_OFFLINE" => "1"})
    assert error.reason == :hub_unreachable
    assert error.message =~ "nobody/has-this-model"
  end

  @tag :slow
  test "an unknown engine option, with the nearest one" do
    error = refusal(DemoModel.path(), quantisation: "awq")
    assert error.reason == :invalid_option
    assert error.message =~ "Did you mean `quantization`?"
    assert error.details["option"] == "quantisation"
  end

  test "a misspelt option of this library" do
    error = refusal(DemoModel.path(), load_timout: 5)
    assert error.reason == :invalid_option
    assert error.message =~ "Did you mean `load_timeout`?"
  end

  @tag :slow
  test "a wrong value: which option, what came, what is allowed" do
    error = refusal(DemoModel.path(), dtype: "float17")
    assert error.reason == :invalid_option
    assert error.message =~ "dtype"
    assert error.message =~ "float17"
    assert error.message =~ "bfloat16"
  end

  # A check of it imports vLLM, which takes seconds; slower tests have it.
  test "a quantization that is not the checkpoint's" do
    error = refused(DemoModel.path("demo-awq"), quantization: "gptq")
    assert error.reason == :unsupported_quantization
    assert error.message =~ "awq"
  end

  @tag :slow
  test "a quantization that nobody knows" do
    error = refusal(DemoModel.path(), quantization: "awk")
    assert error.reason == :unsupported_quantization
    assert error.message =~ "Did you mean `awq`?"
  end

  @tag :slow
  test "a quantization without effect on this model" do
    error = refusal(DemoModel.path(), quantization: :experts_int8)
    assert error.reason == :unsupported_quantization
    assert error.message =~ "has no effect"
  end

  @tag :slow
  test "a KV cache that would be garbage" do
    error = refusal(DemoModel.path(), kv_cache_dtype: :int8_per_token_head)
    assert error.reason == :unsupported
    assert "fp8" in error.details["allowed"]
  end

  @tag :slow
  test "a config that lies about its quantization", %{tmp_dir: dir} do
    model = changed(dir, "demo-gptq", ~s("bits": 4), ~s("bits": 8))
    assert refusal(model).reason == :invalid_checkpoint
  end

  @tag :slow
  test "a config that describes another model", %{tmp_dir: dir} do
    model = changed(dir, "demo", ~s("num_hidden_layers": 6), ~s("num_hidden_layers": 8))
    assert late_refusal(model).reason == :invalid_checkpoint
  end

  @tag :slow
  test "a checkpoint that lacks one of the tensors that vLLM puts together", %{tmp_dir: dir} do
    lacking = "model.layers.3.self_attn.q_proj.weight"

    code =
      "import sys; from safetensors.torch import load_file, save_file; path = sys.argv[1]; " <>
        "tensors = load_file(path); del tensors[sys.argv[2]]; " <>
        "save_file(tensors, path, {'format': 'pt'})"

    File.cp_r!(DemoModel.path(), dir)
    path = Path.join(dir, "model.safetensors")

    {log, status} =
      System.cmd(VLLM.TestPython.executable!(), ["-c", code, path, lacking],
        stderr_to_stdout: true
      )

    assert status == 0, log
    error = late_refusal(dir)
    assert error.reason == :invalid_checkpoint
    assert error.message =~ lacking
  end

  @tag :slow
  test "a folder without a tokenizer, which takes tokens if it is asked to", %{tmp_dir: dir} do
    File.cp_r!(DemoModel.path(), dir)
    for name <- ["tokenizer.json", "tokenizer_config.json"], do: File.rm!(Path.join(dir, name))
    error = late_refusal(dir)
    assert error.reason == :invalid_checkpoint
    assert error.message =~ "skip_tokenizer_init"

    llm = VLLM.llm!(dir, [skip_tokenizer_init: true] ++ DemoModel.options())
    prompt = %{prompt_token_ids: [0, 70, 257]}

    assert [%{outputs: [%{token_ids: [_, _], text: ""}]}] =
             VLLM.generate!(llm, prompt, max_tokens: 2)

    VLLM.stop(llm)
  end

  @tag :slow
  test "no refusal: a folder whose name has spaces and other letters", %{tmp_dir: dir} do
    model = Path.join(dir, "Größe 4 bit — 漢字")
    File.cp_r!(DemoModel.path("demo-awq"), model)
    llm = VLLM.llm!(model, DemoModel.options())
    assert DemoModel.wrong_facts(llm) == []
    assert VLLM.engine_info!(llm).model == model
    VLLM.stop(llm)
  end

  test "a model that is larger than the memory", %{tmp_dir: dir} do
    File.cp_r!(DemoModel.path(), dir)
    # A hole of 4 TB, with a header to match: nothing is read of it.
    bytes = 4 * 1024 ** 4

    header =
      ~s({"model.norm.weight":{"dtype":"BF16","shape":[#{div(bytes, 2)}],"data_offsets":[0,#{bytes}]}})

    path = Path.join(dir, "model.safetensors")
    # Whoever copies this folder later is not to copy 4 TB of nothing.
    on_exit(fn -> File.rm!(path) end)
    File.write!(path, <<byte_size(header)::64-little, header::binary>>)
    {:ok, file} = :file.open(path, [:read, :write, :raw])
    {:ok, _} = :file.position(file, 8 + byte_size(header) + bytes)
    :ok = :file.truncate(file)
    :ok = :file.close(file)

    error = refusal(dir)
    assert error.reason == :out_of_memory
    assert error.message =~ "GiB"
  end

  test "a checkpoint that breaks off", %{tmp_dir: dir} do
    File.cp_r!(DemoModel.path(), dir)
    path = Path.join(dir, "model.safetensors")
    File.write!(path, binary_part(File.read!(path), 0, 1_000_000))
    assert refusal(dir).reason == :invalid_checkpoint
  end

  @tag :slow
  test "a GGUF file that breaks off, or holds no model", %{tmp_dir: dir} do
    text = &<<byte_size(&1)::64-little, &1::binary>>
    says = text.("general.architecture") <> <<8::32-little>> <> text.("clip")
    projector = "GGUF" <> <<3::32-little, 0::64-little, 1::64-little>> <> says
    path = Path.join(dir, "model.gguf")

    File.write!(path, projector)
    assert %Error{reason: :not_a_model, message: message} = refusal(path)
    assert message =~ "mmproj"

    File.write!(path, binary_part(projector, 0, byte_size(projector) - 1))
    assert %Error{reason: :invalid_checkpoint, details: details} = refusal(dir)
    assert details["file"] == path

    File.rm!(path)
    assert %Error{reason: :model_not_found, message: message} = refusal(path)
    assert message =~ path
  end

  test "a Python without vLLM" do
    python = System.find_executable("python3")
    assert refusal(DemoModel.path(), python: python).reason == :vllm_not_installed
  end
end

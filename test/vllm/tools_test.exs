defmodule VLLM.ToolsTest do
  use ExUnit.Case, async: true

  alias VLLM.{DemoModel, Error, FakeInterpreter, Tools}
  alias VLLM.Quantization
  alias VLLM.Quantization.{Adapter, Detected}

  # Nothing is started of it.
  @nowhere "/no/python"

  test "a model is asked about with the options of an engine" do
    options = [replicas: 2, max_model_len: 512, env: [%{"A" => "b"}, %{}]]

    assert {:ok, %Detected{} = detected} =
             Quantization.detect(DemoModel.path("demo-awq"), options)

    assert %{method: "awq", title: "AWQ", format: "gemm", bits: 4, group_size: 128} = detected
    assert %{symmetric: false, ignored: ["lm_head"], dtype: "bfloat16", adapter: nil} = detected
    assert %{parameters: 4_066_560, model_type: "llama", made_for: nil} = detected

    assert %Detected{method: nil, adapter: %Adapter{type: "lora", rank: 8, dora: false}} =
             Quantization.detect!(DemoModel.path("demo-lora"))
  end

  test "what is no model and what is no option is refused without Python" do
    for model <- ["", nil, :llama, <<255>>] do
      assert {:error, %Error{reason: :invalid_option, details: %{"option" => "model"}}} =
               Tools.about("detect", model, python: @nowhere)
    end

    for {name, value} <- [timeout: 0, replicas: 0, python: 1, quantization: self()] do
      options = [{name, value}, {:python, @nowhere}]
      option = Atom.to_string(name)

      assert {:error, %Error{reason: :invalid_option, details: %{"option" => ^option}}} =
               Tools.about("detect", "model", options)
    end
  end

  test "a model is named once" do
    for ask <- [&Quantization.estimate/2, &VLLM.Hub.pull/2] do
      assert {:error, %Error{reason: :invalid_option, details: %{"option" => "model"}} = error} =
               ask.("a/b", model: "a/c", python: @nowhere)

      assert error.message =~ "leave `model` out"
    end
  end

  @tag :tmp_dir
  test "a worker that does not answer in time is given up, with its start", %{tmp_dir: folder} do
    python = FakeInterpreter.with_worker!(folder, "exec sleep 600")

    assert {:error, %Error{reason: :timeout, details: details} = error} =
             Tools.ask("packages", %{"names" => []}, python: python, timeout: 300)

    assert details == %{"method" => "packages", "option" => "timeout", "timeout" => 300}
    assert error.message =~ "within 0.3 seconds"
  end

  test "its environment is the worker's" do
    assert {:error, %Error{reason: :engine_dead, details: %{"log" => [line]}}} =
             Tools.ask("packages", %{"names" => []}, env: %{"PYTHONPATH" => "/nowhere"})

    assert line =~ "No module named vllm_bridge"
  end
end

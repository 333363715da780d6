defmodule VLLM.Real.OnlineTest do
  # The real engine, quantizing the plain demo model while it is loaded.
  use ExUnit.Case

  alias VLLM.{DemoModel, Error}

  @moduletag timeout: 300_000

  for {name, options, method, words} <- [
        {"dtype int8, as an atom", [dtype: :int8], "torchao", "8-bit weights"},
        {"dtype int4", [dtype: "int4"], "bitsandbytes", "4-bit weights"},
        {"torchao with a config of its own",
         [quantization: "torchao", quantization_config: [type: "Int8WeightOnlyConfig"]],
         "torchao", "Int8WeightOnlyConfig"},
        {"hqq with settings of its own",
         [quantization: :hqq, quantization_config: [nbits: 4, group_size: 32]], "hqq",
         "integers of 4 bits in groups of 32"},
        {"fp8", [quantization: :fp8], "fp8", "FP8 weights"}
      ] do
    @tag :slow
    test "#{name} says every sentence, and how it is computed" do
      llm = DemoModel.start!("demo", unquote(options))
      assert DemoModel.wrong_facts(llm) == []
      info = VLLM.engine_info!(llm)
      assert info.quantization == unquote(method)
      assert info.dtype == "bfloat16"
      assert info.quantization_note =~ unquote(words)
      VLLM.stop(llm)
    end
  end

  test "a quantized model is not quantized again" do
    assert {:error, %Error{reason: :unsupported_quantization, message: message}} =
             VLLM.llm(DemoModel.path("demo-awq"), [dtype: "int8"] ++ DemoModel.options())

    assert message =~ "quantized already, with awq"
  end
end

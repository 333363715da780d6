defmodule VLLM.Quantization.ReportTest do
  use ExUnit.Case, async: true

  alias VLLM.{DemoModel, Error, Quantization}
  alias VLLM.Quantization.{Finding, Report}

  # As the worker sends it.
  @wire %{
    "ok" => false,
    "findings" => [
      %{
        "severity" => "warning",
        "reason" => "invalid_checkpoint",
        "message" => "A file is not read.",
        "remedy" => "",
        "details" => %{"file" => "a"}
      },
      %{
        "severity" => "info",
        "reason" => "family",
        "message" => "A text model.",
        "remedy" => "",
        "details" => %{}
      },
      %{
        "severity" => "error",
        "reason" => "from_the_future",
        "message" => "No.",
        "remedy" => "Do.",
        "details" => %{}
      }
    ],
    "model" => "/models/llama",
    "method" => "gptq",
    "kernel" => nil,
    "loaded_bytes" => 12,
    "quantization_config" => %{"bits" => 4}
  }

  test "a misspelt option may be one of the check's own" do
    wire = %{
      "severity" => "error",
      "reason" => "invalid_option",
      "message" => "Unknown engine option `timout`.",
      "remedy" => "",
      "details" => %{"option" => "timout", "nearest" => nil}
    }

    assert %Finding{remedy: "Did you mean `timeout`?"} = Finding.from_wire(wire)
  end

  test "a report has the findings in their order, and of what is not known nothing" do
    assert %Report{ok?: false, method: "gptq", loaded_bytes: 12, max_model_len: nil} =
             report = Report.from_wire(@wire)

    assert report.findings == [
             %Finding{
               severity: :warning,
               reason: :invalid_checkpoint,
               message: "A file is not read.",
               remedy: "",
               details: %{"file" => "a"}
             },
             %Finding{
               severity: :info,
               reason: :family,
               message: "A text model.",
               remedy: "",
               details: %{}
             },
             %Finding{
               severity: :error,
               reason: :internal,
               message: "No.",
               remedy: "Do.",
               details: %{"reason" => "from_the_future"}
             }
           ]
  end

  test "what keeps a model from running is no failure to ask" do
    assert {:ok, %Report{ok?: false, method: "awq", findings: findings}} =
             Quantization.check(DemoModel.path("demo-awq"), quantisation: "awq", dtype: "int8")

    assert [
             %Finding{severity: :error, reason: :invalid_option, details: %{"option" => option}},
             %Finding{severity: :error, reason: :unsupported_quantization},
             %Finding{severity: :info, reason: :family, details: %{"family" => "text"}}
           ] = findings

    assert option == "quantisation"
    assert hd(findings).remedy == "Did you mean `quantization`?"

    assert {:error, %Error{reason: :python_not_found}} =
             Quantization.check(DemoModel.path(), python: "/no/python")
  end

  test "quantizing in place says what it would make, and what must be installed for it" do
    env = %{"EX_VLLM_QUANTIZE_PYTHON" => nil}

    assert {:ok, %Report{ok?: false, method: "gguf", findings: findings}} =
             Quantization.check(DemoModel.path(), isq: "Q8_1", env: env)

    assert [
             %Finding{severity: :error, reason: :quantize_not_installed, remedy: remedy},
             %Finding{severity: :info, reason: :family},
             %Finding{severity: :info, reason: :isq, message: "Quantized in place to Q8_0" <> _}
           ] = findings

    assert remedy == "Run `mix vllm.setup --with quantize`."
  end
end

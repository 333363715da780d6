defmodule VLLM.Quantization.MethodTest do
  use ExUnit.Case, async: true

  alias VLLM.{Error, Quantization}
  alias VLLM.Quantization.{Format, Method}

  # Recorded from a worker.
  @wire %{
    "name" => "bitsandbytes",
    "title" => "bitsandbytes",
    "other_names" => ["bnb", "nf4"],
    "bits" => [4, 8],
    "formats" => [
      %{"name" => "bitsandbytes (4 bits)", "bits" => 4, "runs" => true, "why_not" => nil},
      %{"name" => "bitsandbytes (8 bits)", "bits" => 8, "runs" => nil, "why_not" => "It cannot."}
    ],
    "pre_quantized" => true,
    "in_flight" => %{"name" => "NF4", "bits" => 4, "runs" => true, "why_not" => nil},
    "dtype" => "int4",
    "extra" => "bitsandbytes",
    "installed" => true,
    "capability" => 7.0,
    "runs" => true,
    "why_not" => nil,
    "note" => "quantizes each weight as it is read",
    "unheard_of" => 1
  }

  test "has all that a worker says" do
    assert Method.from_wire(@wire) == %Method{
             name: "bitsandbytes",
             title: "bitsandbytes",
             other_names: ["bnb", "nf4"],
             bits: [4, 8],
             formats: [
               %Format{name: "bitsandbytes (4 bits)", bits: 4, runs?: true},
               %Format{name: "bitsandbytes (8 bits)", bits: 8, why_not: "It cannot."}
             ],
             pre_quantized?: true,
             in_flight: %Format{name: "NF4", bits: 4, runs?: true},
             dtype: "int4",
             extra: "bitsandbytes",
             installed?: true,
             capability: 7.0,
             runs?: true,
             note: "quantizes each weight as it is read"
           }

    assert Method.from_wire(%{@wire | "in_flight" => nil}).in_flight == nil
    assert inspect(Method.from_wire(%{@wire | "bits" => [8]})) =~ "bits: [8]"
  end

  test "methods/1 takes no options of an engine" do
    assert {:error, %Error{reason: :invalid_option, details: %{"option" => "max_model_len"}}} =
             Quantization.methods(max_model_len: 1)

    assert {:error, %Error{reason: :python_not_found}} =
             Quantization.methods(python: "/no/python")
  end
end

defmodule VLLM.Quantization do
  @moduledoc """
  What there is to know of a model and its quantization before it is loaded.

      {:ok, detected} = VLLM.Quantization.detect("/models/Mistral-7B-AWQ")
      detected.method
      #=> "awq"

  A model is what `VLLM.llm/2` takes, and so are the options: those of an engine, checked in the same
  way. No weights are read, and no engine is started: each question is answered by a Python process
  of its own, within a second or two. Of this library's own options these have a meaning here:
  `:python` and `:env`, as of an engine, and

  #{VLLM.Options.docs(VLLM.Options.tools())}
  """

  alias VLLM.{Error, Tools}
  alias VLLM.Quantization.Detected

  @doc """
  What a model is and how it is quantized, from its config and the headers of its files; or, of an
  adapter's folder, what the adapter is.

  Errors are those of the model: `:model_not_found`, `:not_a_model`, `:model_gated`,
  `:hub_unreachable`, `:invalid_checkpoint`. That a quantization cannot be computed here is none:
  `check/2` tells that.

      {:ok, %VLLM.Quantization.Detected{method: "gptq", bits: 4, group_size: 128}} =
        VLLM.Quantization.detect("/models/Llama-2-7B-GPTQ")
  """
  @spec detect(String.t(), keyword() | map()) :: {:ok, Detected.t()} | {:error, Error.t()}
  def detect(model, options \\ []) do
    with {:ok, wire} <- Tools.about("detect", model, options),
         do: {:ok, Detected.from_wire(wire)}
  end

  @doc "Like `detect/2`, but raises `VLLM.Error`."
  @spec detect!(String.t(), keyword() | map()) :: Detected.t()
  def detect!(model, options \\ []), do: bang!(detect(model, options))

  defp bang!({:ok, result}), do: result
  defp bang!({:error, %Error{} = error}), do: raise(error)
end

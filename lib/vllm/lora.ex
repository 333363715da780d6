defmodule VLLM.LoRA do
  @moduledoc false
  # The adapters of an engine; see the functions of VLLM that delegate here, and
  # vllm_bridge/lora.py.

  alias VLLM.Engine.Call
  alias VLLM.{Error, LoRARequest, Options, Remote}

  @doc "See `VLLM.lora_request/4`."
  @spec request(String.t(), pos_integer(), String.t(), keyword() | map()) ::
          {:ok, LoRARequest.t()} | {:error, Error.t()}
  def request(name, id, path, options) do
    with {:ok, options} <- Options.to_map(options),
         do: request(name, path, Map.put(options, "lora_int_id", id))
  end

  @doc "See `VLLM.lora_request/3`."
  @spec request(String.t(), String.t(), keyword() | map()) ::
          {:ok, LoRARequest.t()} | {:error, Error.t()}
  @spec request(String.t(), pos_integer(), String.t()) ::
          {:ok, LoRARequest.t()} | {:error, Error.t()}
  def request(name, id, path) when is_integer(id), do: request(name, id, path, [])

  def request(name, path, options) do
    with {:ok, name} <- Options.check(:string, :lora_name, name),
         {:ok, path} <- Options.check(:string, :lora_path, path),
         {:ok, options} <- Options.only(options, Options.lora_request()) do
      request = LoRARequest.new(name, Options.expand(path))
      id = options.lora_int_id || request.lora_int_id
      {:ok, struct!(request, %{options | lora_int_id: id})}
    end
  end

  @doc "See `VLLM.load_lora/3`."
  @spec load(VLLM.engine(), LoRARequest.t() | String.t(), keyword() | map()) ::
          :ok | {:error, Error.t()}
  def load(engine, request, options) do
    with {:ok, request} <- Options.check(:lora_request, :lora_request, request),
         {:ok, _} <- each(engine, "load_lora", %{"lora_request" => request}, options),
         do: :ok
  end

  @doc "See `VLLM.unload_lora/3`."
  @spec unload(VLLM.engine(), LoRARequest.t() | String.t(), keyword() | map()) ::
          :ok | {:error, Error.t()}
  def unload(engine, %LoRARequest{lora_name: name}, options), do: unload(engine, name, options)

  def unload(engine, name, options) do
    with {:ok, name} <- Options.check(:string, :lora_name, name),
         {:ok, found} <- each(engine, "unload_lora", %{"lora_name" => name}, options) do
      if Enum.any?(found),
        do: :ok,
        else:
          {:error,
           Error.new(:model_not_found, "The engine has no adapter of the name `#{name}`.", %{
             "lora_name" => name
           })}
    end
  end

  @doc "See `VLLM.list_loras/2`."
  @spec list(VLLM.engine(), keyword() | map()) :: {:ok, [LoRARequest.t()]} | {:error, Error.t()}
  def list(engine, options) do
    with {:ok, lists} <- each(engine, "list_loras", %{}, options) do
      {:ok, lists |> Enum.concat() |> Enum.uniq() |> Enum.map(&LoRARequest.from_wire/1)}
    end
  end

  defp each(engine, method, params, options) do
    with {:ok, opts} <- Options.only(options, Options.call()),
         do: Remote.run(engine, {:each, method, params}, Call.new(opts))
  end
end

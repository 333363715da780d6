defmodule VLLM.Error do
  @moduledoc """
  The one error of this library: what went wrong, and what to do about it.

  Functions without `!` return it as `{:error, %VLLM.Error{}}`; those with `!`
  raise it.

    * `:reason` - an atom of the table below, to match on
    * `:message` - a sentence for people: what happened and what to do
    * `:details` - a map with string keys, for programs and bug reports: the
      option's name, the path to what is wrong in its value, the nearest known
      name, the last log lines, and of a fault that is not the caller's a Python
      traceback (`"traceback"`, which `inspect` leaves out). Its keys depend on the
      reason and may grow. Where the message ends with what to do, `"remedy"` has
      that part by itself.

  ## Reasons

  | reason | meaning |
  | --- | --- |
  #{Enum.map_join(VLLM.Error.Reasons.all(), "\n  ", fn {reason, meaning} -> "| `#{inspect(reason)}` | #{meaning} |" end)}
  """

  @enforce_keys [:reason, :message]
  defexception [:reason, :message, details: %{}]

  @type t :: %__MODULE__{reason: atom(), message: String.t(), details: map()}

  @known Map.new(VLLM.Error.Reasons.all(), fn {reason, _} -> {Atom.to_string(reason), reason} end)

  @doc false
  @spec new(atom(), String.t(), map()) :: t()
  def new(reason, message, details \\ %{}) do
    %__MODULE__{reason: reason, message: message, details: details}
  end

  # What `foo!` makes of what `foo` returns.
  @doc false
  @spec bang!(:ok | {:ok, result} | {:error, t()}) :: :ok | result when result: term()
  def bang!(:ok), do: :ok
  def bang!({:ok, result}), do: result
  def bang!({:error, %__MODULE__{} = error}), do: raise(error)

  # A reason that this version does not know (a newer worker) stays readable in
  # the details; the wire never makes an atom.
  @doc false
  @spec from_wire(term()) :: t()
  def from_wire(%{"reason" => reason, "message" => message} = error)
      when is_binary(reason) and is_binary(message) do
    details = error["details"]
    details = if is_map(details) and not is_struct(details), do: details, else: %{}

    case @known do
      %{^reason => atom} -> new(atom, message, details)
      _ -> new(:internal, message, Map.put(details, "reason", reason))
    end
  end

  def from_wire(other) do
    new(:protocol, "The worker answered with an error that is not one.", %{"error" => other})
  end

  # Thirty lines of Python are for logs and bug reports, and not for iex.
  defimpl Inspect do
    def inspect(%{details: %{"traceback" => traceback} = details} = error, opts)
        when is_binary(traceback) do
      lines = traceback |> String.split("\n", trim: true) |> length()
      details = %{details | "traceback" => "(#{lines} lines)"}
      Inspect.Any.inspect(%{error | details: details}, opts)
    end

    def inspect(error, opts), do: Inspect.Any.inspect(error, opts)
  end
end

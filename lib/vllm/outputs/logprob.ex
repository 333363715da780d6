defmodule VLLM.Logprob do
  @moduledoc """
  The log probability of one token at one place.

    * `:logprob` - natural logarithm of the probability; `:neg_infinity` for a probability of 0,
      `:nan` where the model computed none
    * `:rank` - its place among all tokens, from 1 for the likeliest; nil if vLLM gave none
    * `:decoded_token` - its text, or nil

  Places are maps from token ids to these, as in vLLM; there are more than were asked for where
  the chosen token is not among the likeliest.
  """

  @enforce_keys [:logprob]
  defstruct [:logprob, :rank, :decoded_token]

  @type t :: %__MODULE__{
          logprob: float() | :neg_infinity | :nan,
          rank: pos_integer() | nil,
          decoded_token: String.t() | nil
        }

  @typedoc "A place; nil for the first token of a prompt, which nothing comes before."
  @type place :: %{(token_id :: non_neg_integer()) => t()} | nil

  @none 0xFFFFFFFF

  @doc false
  @spec from_wire(map() | nil) :: [place()] | nil
  def from_wire(nil), do: nil

  def from_wire(%{"counts" => counts} = columns) do
    entries =
      entries(columns["token_ids"], columns["logprobs"], columns["ranks"], columns["tokens"])

    places(counts, entries)
  end

  defp entries(
         <<id::32-little, ids::binary>>,
         <<logprob::binary-4, logprobs::binary>>,
         <<rank::32-little, ranks::binary>>,
         [
           token | tokens
         ]
       ) do
    entry = %__MODULE__{
      logprob: float(logprob),
      rank: if(rank > 0, do: rank),
      decoded_token: token
    }

    [{id, entry} | entries(ids, logprobs, ranks, tokens)]
  end

  defp entries(<<>>, <<>>, <<>>, []), do: []

  defp float(<<float::32-float-little>>), do: float
  defp float(<<0x00, 0x00, 0x80, 0xFF>>), do: :neg_infinity
  # No logarithm of a probability is infinity either.
  defp float(_), do: :nan

  defp places(<<@none::32-little, counts::binary>>, entries), do: [nil | places(counts, entries)]

  defp places(<<count::32-little, counts::binary>>, entries) do
    {place, entries} = Enum.split(entries, count)
    [Map.new(place) | places(counts, entries)]
  end

  defp places(<<>>, []), do: []
end

"""A layout with a new feature, or a new pair of features, must join the tier that promises all of them."""

from layouts import ALL, NORMAL, PAIRS, features, pairs


def union(of, names):
    return set().union(*map(of, names))


def test_the_normal_tier_has_every_feature():
    missing = {feature: [n for n in ALL if feature in features(n)] for feature in union(features, ALL)}
    missing = {feature: names for feature, names in missing.items() if not NORMAL & set(names)}
    assert not missing, f"add one layout per feature to NORMAL: {missing}"
    assert ALL.keys() >= NORMAL


def test_the_tier_of_pairs_has_every_pair():
    tier = NORMAL | PAIRS
    missing = {pair: [n for n in ALL if pair in pairs(n)] for pair in union(pairs, ALL) - union(pairs, tier)}
    assert not missing, f"add one layout per pair to PAIRS: {missing}"
    assert ALL.keys() >= PAIRS
    assert not NORMAL & PAIRS


def test_features_of_some_layouts_by_hand():
    assert features("tp2") == {"student tp"}
    assert features("dp2_packed") == {"student dp", "packed"}
    assert features("tp2_teacher_dp2") == {"student tp", "teacher in another layout", "teacher dp"}
    assert features("pp2_teacher_dp2_apart_packed") == {
        *("student pp", "teacher apart", "teacher dp", "teacher replicas", "packed")
    }
    assert features("tp2_ep2_sp_experts_whole") == {
        *("student tp", "student ep", "student sp", "student etp"),
        *("teacher in another layout", "teacher ep", "teacher dp"),
    }
